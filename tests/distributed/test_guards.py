"""Several ranks agree: on what to leave out, on stopping, and on who is gone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crysforge.trainer.base.signals import REQUEUE
from crysforge.trainer.loop.guards import load_batch
from crysforge.trainer.loop.watchdog import Watchdog
from tests.distributed.faults import KILLED
from tests.distributed.jobs import curve
from tests.distributed.ranks import ROOT, free_port
from tests.distributed.trials import ALONE

pytestmark = pytest.mark.distributed

VAE = [*ALONE.args, "stages=[vae]", "vae.max_steps=6", "trainer.validate_every=0"]
STEP = "crysforge.trainer.engines.deepspeed:DeepSpeedEngine.step"


@pytest.fixture
def run(server, data, tmp_path):
    """Runs a job on two ranks: (exit codes, output); `run.path` is its directory."""

    def run(*args: str, **faults):
        chosen = {int(rank.removeprefix("rank")): fault for rank, fault in faults.items()}
        ended = server.run(
            "pretrain", *VAE, f"data={data}", f"run_dir={run.path}", *args, ranks=2, faults=chosen
        )
        return ended.codes, ended.output

    run.path = tmp_path / "run"
    return run


def events(path: Path, kind: str, rank: int) -> list[dict]:
    lines = (path / "events" / f"rank-{rank:04d}.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if x["event"] == kind]


@pytest.mark.parametrize("zero", [0, 2])
def test_one_ranks_nan_is_left_out_by_both(run, zero):
    """The rank that had it names its crystals and keeps its batch."""
    codes, output = run(
        f"trainer.zero_stage={zero}",
        rank1={"at": "crysforge.trainer.stages.vae:VAEStage.forward", "call": 3, "do": "nan"},
    )
    assert codes == [0, 0], output
    skips = [events(run.path, "skip", rank) for rank in (0, 1)]
    assert [len(s) for s in skips] == [1, 1]
    assert [s[0]["step"] for s in skips] == [3, 3]
    assert skips[0][0]["crystals"] == [] and len(skips[1][0]["crystals"]) == 8
    (name,) = skips[1][0]["batches"]
    assert load_batch(run.path / "skipped" / name).ids == skips[1][0]["crystals"]
    losses = dict(curve(run.path, "vae"))
    assert all(abs(losses[s]) < 1e3 for s in (1, 2, 4, 5, 6))
    assert curve(run.path, "vae", "optim/skipped")[-1][1] == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_signal_stops_both(run, rank):
    """Loader workers get it as well and do not mind; the run is saved once and goes on."""
    fault = {"at": STEP, "call": 2, "do": "group SIGTERM"}
    codes, output = run("loader.workers=1", **{f"rank{rank}": fault})
    assert codes == [REQUEUE, REQUEUE], output
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["vae-00000003"]
    reasons = [events(run.path, "stop", r)[0]["reason"] for r in (0, 1)]
    assert reasons[rank] == "SIGTERM" and reasons[1 - rank] == "another rank was asked to"
    beat = json.loads((run.path / "heartbeat.json").read_text())
    assert (beat["status"], beat["step"]) == ("stopped", 3)
    codes, output = run()
    assert codes == [0, 0], output
    assert events(run.path, "resume", 1)[0]["step"] == 3
    assert [s for s, _ in curve(run.path, "vae")] == [1, 2, 3, 4, 5, 6]


def test_the_walltime_stops_both(run):
    """However short it is, one step is taken and saved."""
    codes, output = run("trainer.walltime_minutes=0")
    assert codes == [REQUEUE, REQUEUE], output
    assert events(run.path, "stop", 0)[0] | {"time": 0} == {
        "time": 0, "event": "stop", "stage": "vae", "rank": 0, "step": 1, "reason": "walltime"
    }  # fmt: skip


def test_a_lost_rank_is_one_line(run):
    codes, output = run(rank1={"at": STEP, "call": 2, "do": "SIGKILL"})
    assert codes == [1, KILLED]
    assert "error: rank 0 lost the other ranks" in output
    assert "Traceback" not in output


def test_a_full_disk_costs_a_checkpoint_and_no_more(run):
    full = {
        "at": "crysforge.trainer.runs.checkpoint:RunDirectory.save",
        "call": 2,
        "do": "disk full",
    }
    codes, output = run("trainer.checkpoint_every=2", "trainer.keep=9", rank0=full)
    assert codes == [0, 0], output
    assert "checkpoint not written: [Errno 27] File too large" in output  # how it is staged
    assert "the newest one is vae-00000002" in output
    assert [e["step"] for e in events(run.path, "save", 0)] == [2, 6]
    assert events(run.path, "finish", 1)


@pytest.mark.parametrize("how", ["remove", "delete"])
def test_a_run_directory_that_goes_ends_both_and_blocks_nothing(run, how):
    goes = {"at": STEP, "call": 3, "do": f"{how} {run.path}"}
    codes, output = run("trainer.checkpoint_every=2", rank1=goes)
    assert codes == [2, 2], output
    assert output.count(f"{run.path} was deleted or renamed while the run was going on") == 2
    assert "Traceback" not in output
    codes, output = run()
    assert codes == [0, 0], output
    assert [s for s, _ in curve(run.path, "vae")] == [1, 2, 3, 4, 5, 6]


def test_a_hanging_rank_ends_and_takes_the_other_with_it(run):
    hang = {"at": "crysforge.trainer.loop.training:weighted_loss", "call": 2, "do": "hang"}
    codes, output = run("trainer.step_timeout_s=2", rank1=hang)
    assert Watchdog.EXIT in codes and set(codes) <= {Watchdog.EXIT, 2}, (codes, output)
    # Rank 0 has written its own as well, unless rank 1 was gone before its time was up.
    stacks = {p.name: p.read_text() for p in (run.path / "stacks").iterdir()}
    assert all("in train_step" in text for text in stacks.values()), stacks
    assert "faults.py" in stacks["vae-rank-0001.txt"]  # what hangs


def test_the_deepspeed_launcher_ends_with_the_ranks_code(data, tmp_path):
    deepspeed = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    path, output = tmp_path / "run", tmp_path / "output"
    endless = ["vae.max_steps=1000000", "vae.epochs=1000000"]
    args = [*VAE, *endless, f"data={data}", f"run_dir={path}"]
    command = [str(deepspeed), "--num_gpus", "2", "--master_port", str(free_port())]
    with open(output, "w") as file:
        launcher = subprocess.Popen(
            [*command, "launch/pretrain.py", *args],
            cwd=ROOT, start_new_session=True, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        while not (path / "heartbeat.json").is_file():
            assert launcher.poll() is None, output.read_text()[-3000:]
            time.sleep(0.05)
        os.kill(json.loads((path / "heartbeat.json").read_text())["pid"], signal.SIGUSR1)
        assert launcher.wait(timeout=120) == REQUEUE, output.read_text()[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert list((path / "checkpoints").iterdir())
