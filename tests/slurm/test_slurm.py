"""Jobs on a real Slurm: whatever ends an attempt, the run is completed with an unbroken curve."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT
from tests.slurm.cluster import state, wait_for
from tests.slurm.conftest import FINETUNE, PRETRAIN, STEPS, Desk, board, curve

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def pretrained(desk: Desk) -> Path:
    """A run on two nodes that nobody disturbs."""
    desk.submit(*PRETRAIN, "run_dir=runs/pretrained")
    row = desk.wait("runs/pretrained")["pretrained"]
    assert (row.state, row.retries) == ("finished", ""), row
    return desk.path / "runs/pretrained"


@pytest.fixture(scope="module")
def finetuned(desk: Desk) -> Path:
    """A run of one process that nobody disturbs."""
    desk.submit(*FINETUNE, "run_dir=runs/finetuned")
    row = desk.wait("runs/finetuned")["finetuned"]
    assert (row.state, row.retries) == ("finished", ""), row
    return desk.path / "runs/finetuned"


def assert_unbroken(desk: Desk, output: str, undisturbed: Path) -> None:
    """The run took more than one attempt, and is complete; every step was logged once, with the
    losses of the undisturbed run, and TensorBoard shows one curve."""
    row = desk.wait(output)[Path(output).name]
    assert row.state == "finished", (row, desk.events(output))
    assert row.retries and int(row.retries) >= 1, desk.events(output)
    assert curve(desk.path / output) == curve(undisturbed)
    assert board(desk.path / output) == board(undisturbed)


def test_two_nodes_train_one_model(desk, pretrained):
    steps = [(stage, step) for stage, step, _ in curve(pretrained)]
    assert steps == [("vae", step) for step in range(1, STEPS + 1)]
    log = f"{pretrained}.submit/logs/{desk.job('runs/pretrained')}_1_log.out"
    assert "rank 1/2" in Path(log).read_text()


def test_a_signal_to_two_nodes_ends_a_turn(desk, pretrained):
    output = "runs/signalled"
    desk.submit(*PRETRAIN, f"run_dir={output}")
    desk.wait_for_step(output, 3)
    with desk.frozen(output):
        desk.cluster.run("scancel", "--signal=USR2", desk.job(output))
    assert_unbroken(desk, output, pretrained)
    assert desk.events(output) == ["start", "stopped", "requeue", "start", "finished"]


def test_a_node_fails_and_comes_back(desk, pretrained):
    output = "runs/node-failure"
    desk.submit(*PRETRAIN, f"run_dir={output}")
    desk.wait_for_step(output, 3)
    with desk.frozen(output):
        desk.cluster.fail_node("node2")
    wait_for(lambda: "down" in desk.cluster.node_states()[1], "Slurm misses the node")
    desk.cluster.start_node("node2")
    assert_unbroken(desk, output, pretrained)


def test_a_script_of_ones_own(desk, pretrained):
    """The one in docs/cluster.md, with what differs here put in; stopped once."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    script = text[text.index("#!/bin/bash") :].partition("```")[0]
    output, args = "runs/by-hand", [a for a in PRETRAIN if a not in ("job=pretrain", "nodes=2")]
    own = {
        "--ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8": "--ntasks-per-node=1",
        "export MASTER_ADDR": "[ $MASTER_ADDR = node1 ] && export MASTER_ADDR=127.0.0.1",
        ".venv/bin/python launch/": shlex.join([sys.executable, f"{ROOT}/launch/"]),
        "--config configs/pretrain/crysldnet.yaml": shlex.join(args),
        "data=data/gnome run_dir=runs/gnome": f"run_dir={output}",
    }
    for theirs, ours in own.items():
        assert script.count(theirs) == 1, theirs
        script = script.replace(theirs, ours)
    (desk.path / "job.sh").write_text(script)
    options = (f"--chdir={desk.path}", "--output=by-hand.out", "--parsable")
    job = desk.cluster.run("sbatch", *options, str(desk.path / "job.sh")).strip()
    log = desk.path / "by-hand.out"
    wait_for(lambda: len(curve(desk.path / output)) >= 3, "the run is at step 3", pause=0.02)
    with desk.frozen(output, job):
        desk.cluster.run("scancel", "--signal=USR2", job)
    wait_for(
        lambda: job not in desk.cluster.run("squeue", "--noheader", "--format=%i").split(),
        "it ends",
    )
    said = log.read_text()
    assert "rank 1/2 on" in said and "the same command continues" in said, said[-3000:]
    assert desk.cluster.run("scontrol", "show", "job", job).count("Restarts=1 ") == 1, said[-3000:]
    assert curve(desk.path / output) == curve(pretrained)
    assert board(desk.path / output) == board(pretrained)


def test_an_operator_requeues(desk, finetuned):
    output = "runs/requeued"
    desk.submit(*FINETUNE, f"run_dir={output}")
    desk.wait_for_step(output, 3)
    with desk.frozen(output):  # until Slurm's own SIGCONT
        desk.cluster.run("scontrol", "requeue", desk.job(output))
    assert_unbroken(desk, output, finetuned)
    assert "requeue" not in desk.events(output)  # Slurm did it, the task did not ask again


@pytest.mark.parametrize("whom", ["launch/finetune.py", "submitit.core._submit"])
def test_a_process_is_killed(desk, finetuned, whom):
    """The one that trains, as for its memory, or the one above it, which then has no last word."""
    output = f"runs/{whom.split('/')[0]}"
    desk.submit(*FINETUNE, f"run_dir={output}")
    desk.wait_for_step(output, 3)
    with desk.frozen(output):
        for pid in desk.processes(output, whom.encode()):
            with contextlib.suppress(ProcessLookupError):  # it went with its parent
                os.kill(pid, signal.SIGKILL)
    assert_unbroken(desk, output, finetuned)
    assert desk.events(output) == ["start", "crashed", "requeue", "start", "finished"]


def test_time_runs_out(desk, finetuned):
    """The limit is set when the run is under way, and taken back for its second attempt: how long a
    machine takes to start is no matter."""
    output = "runs/limited"
    desk.submit(*FINETUNE, f"run_dir={output}", "time=60", "slurm.signal=USR2@5")
    desk.wait_for_step(output, 3)
    job = desk.job(output)
    with desk.frozen(output) as pids:
        desk.cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+40")
        desk.wait_until(lambda: state(pids[0]) != "T", "Slurm warns of the limit", output)
    desk.wait_until(lambda: "requeue" in desk.events(output), "the job asks for more", output)
    desk.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert_unbroken(desk, output, finetuned)
    assert desk.events(output) == ["start", "stopped", "requeue", "start", "finished"]
