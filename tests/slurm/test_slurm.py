"""Jobs on a real Slurm: whatever ends a turn, the run gets to its end with an unbroken curve."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import Desk, curve

pytestmark = pytest.mark.slurm

PRETRAIN = (
    "job=pretrain",
    "nodes=2",
    "--config",
    "configs/pretrain/tiny.yaml",
    "data=data",
    "stages=[vae]",
    "vae.max_steps=10",
    "vae.batch_size=16",
    "trainer.log_every=1",
    "trainer.checkpoint_every=2",
    "trainer.deterministic=true",
    "loader.workers=0",
)

FINETUNE = (
    "job=finetune",
    "--config",
    "configs/finetune/tiny.yaml",
    "data=data",
    "init_from=none",
    "finetune.max_steps=20",
    "finetune.batch_size=16",
    "trainer.log_every=1",
    "trainer.deterministic=true",
    "loader.workers=0",
)


@pytest.fixture(scope="module")
def uninterrupted(desk: Desk) -> list:
    """The curve of a run on two nodes that nobody disturbs."""
    desk.submit(*PRETRAIN, "run_dir=runs/whole")
    row = desk.wait("runs/whole")["whole"]
    assert (row.state, row.retries) == ("finished", "0"), row
    return curve(desk.path / "runs/whole")


def assert_unbroken(desk: Desk, output: str, uninterrupted: list) -> None:
    """The run took more than one turn, and is complete; every step was logged once, with the
    losses of the undisturbed run."""
    row = desk.wait(output)[Path(output).name]
    assert row.state == "finished", row
    assert int(row.retries) >= 1, desk.events(output)
    assert curve(desk.path / output) == uninterrupted


def test_two_nodes_train_one_model(desk, uninterrupted):
    assert [(stage, step) for stage, step, _ in uninterrupted] == [
        ("vae", step) for step in range(1, 11)
    ]
    text = (desk.path / "runs/whole.submit/logs").joinpath(f"{desk.job('runs/whole')}_1_log.out")
    assert "rank 1/2" in text.read_text()


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_a_signal_ends_a_turn(desk, uninterrupted, name):
    output = f"runs/{name}"
    desk.submit(*PRETRAIN, f"run_dir={output}")
    desk.wait_for_step(output, 3)
    with desk.frozen(output):
        desk.cluster.run("scancel", f"--signal={name}", desk.job(output))
    assert_unbroken(desk, output, uninterrupted)
    assert desk.events(output) == ["start", "stopped", "requeue", "start", "finished"]


def test_requeue_by_an_operator(desk, uninterrupted):
    output = "runs/requeued"
    desk.submit(*PRETRAIN, f"run_dir={output}")
    desk.wait_for_step(output, 3)
    with desk.frozen(output):  # until Slurm's own SIGCONT
        desk.cluster.run("scontrol", "requeue", desk.job(output))
    assert_unbroken(desk, output, uninterrupted)
    assert "requeue" not in desk.events(output)  # Slurm did it, the task did not ask again


def test_a_node_fails_and_comes_back(desk, uninterrupted):
    output = "runs/node-failure"
    desk.submit(*PRETRAIN, f"run_dir={output}")
    desk.wait_for_step(output, 5)
    with desk.frozen(output):
        desk.cluster.fail_node("node2")
    wait_for(lambda: "down" in desk.cluster.node_states()[1], "Slurm misses the node", 120)
    desk.cluster.start_node("node2")
    assert_unbroken(desk, output, uninterrupted)


def test_time_runs_out(desk, tmp_path):
    one, other = "runs/unlimited", "runs/limited"
    args = (*FINETUNE, "target=ewald_energy")
    desk.submit(*args, f"run_dir={one}")
    desk.submit(*args, f"run_dir={other}", "time=1", "slurm.signal=USR2@5")
    desk.wait_for_step(other, 3)
    with desk.frozen(other) as pids:
        wait_for(lambda: not _stopped(pids[0]), "Slurm warns of the time limit", 90)
    desk.wait(one)
    assert_unbroken(desk, other, curve(desk.path / one))


def test_one_failed_cell_hides_no_other(desk):
    cells = [f"- {{target: {t}, seed: {s}}}\n" for t in ("density", "ewald_energy") for s in (0, 1)]
    cells += ["- {target: no_such_label}\n", "- {target: density, label_fraction: 0.5}\n"]
    (desk.path / "cells.yaml").write_text("".join(cells))
    args = (*FINETUNE, "finetune.max_steps=4", "sweep=cells.yaml", "run_dir=runs/sweep")
    assert "submitted 6 cell(s)" in desk.submit(*args)
    rows = desk.wait("runs/sweep")
    bad = "target=no_such_label"
    assert {r.state for r in rows.values() if r.cell != bad} == {"finished"}
    assert rows[bad].state == "failed"
    assert "no_such_label" in rows[bad].reason
    assert "no_such_label" in desk.submit("status=runs/sweep")

    desk.submit("collect=runs/sweep")
    with open(desk.path / "runs/sweep/results.csv", newline="") as file:
        results = {row["cell"]: row for row in csv.DictReader(file)}
    assert results.keys() == rows.keys()
    assert {cell for cell, row in results.items() if row["test.mae"]} == rows.keys() - {bad}
    assert results["target=density,seed=1"]["seed"] == "1"

    again = desk.submit(*args, "--dry-run")  # only what has not finished is left
    assert again.count("# target=") == 1 and f"# {bad}" in again


def test_a_cancelled_job_stays_cancelled(desk):
    """Both by our command and by Slurm's own."""
    args = (*FINETUNE, "target=density", "finetune.max_steps=100000", "finetune.epochs=100000")
    output = "runs/cancelled"
    desk.submit(*args, f"run_dir={output}", "sweep=[seed=[0,1]]")
    by_hand, by_us = "seed=0", "seed=1"
    for cell in (by_hand, by_us):
        desk.wait_for_step(f"{output}/{cell}", 1)
    desk.cluster.run("scancel", desk.job(output, by_hand))
    wait_for(lambda: not desk.rows(output)[by_hand].active, "the cell has ended", 60)
    assert desk.rows(output)[by_us].active
    assert "1 jobs ended" in desk.submit(f"cancel={output}")
    rows = desk.wait(output, seconds=60)
    assert {r.state for r in rows.values()} == {"cancelled"}
    for cell in rows:
        assert desk.events(output, cell) == ["start", "stopped"]


def test_sbatch_takes_what_users_write_and_refuses_with_a_reason(desk):
    hostile = 'it\'s "quoted" $(touch pwned) `touch pwned` ; touch pwned'
    args = (*FINETUNE, "target=density", "run_dir=runs/hostile")
    desk.submit(*args, f"slurm.comment={hostile}", f"name={hostile}", "slurm.hold=true")
    shown = desk.cluster.run("scontrol", "show", "job", desk.job("runs/hostile"))
    assert f"Comment={hostile}" in shown
    assert not list(desk.path.rglob("pwned"))
    desk.submit("cancel=runs/hostile")
    with pytest.raises(ValueError, match=r"sbatch refused: .*partition"):
        desk.submit(*FINETUNE, "target=density", "run_dir=runs/refused", "partition=nowhere")


def test_the_command_line_itself(desk):
    """As a user types it, with relative paths, from another directory than the repository."""
    command = [sys.executable, str(ROOT / "launch" / "submit.py")]
    done = subprocess.run(
        [*command, "status=runs/nowhere"],
        cwd=desk.path,
        env=desk.cluster.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs/nowhere")


def _stopped(pid: int) -> bool:
    """Whether a process is held by SIGSTOP; Slurm continues it when it has something to say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except OSError:
        return False
