"""Sweeps, states and commands on a real Slurm."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from crysforge.launch.cluster.submission import Submission
from tests.distributed.ranks import ROOT
from tests.slurm.conftest import FINETUNE

pytestmark = pytest.mark.slurm

HOSTILE = 'it\'s "quoted" $(touch pwned) `touch pwned` ; touch pwned'


def test_one_failed_cell_hides_no_other(desk):
    """An array of six, one of them with a target that no data has and a shell would run."""
    runs = [f"- {{target: {t}, seed: {s}}}\n" for t in ("density", "ewald_energy") for s in (0, 1)]
    runs += ["- {target: density, label_fraction: 0.5}\n", f"- target: {json.dumps(HOSTILE)}\n"]
    (desk.path / "list.yaml").write_text("".join(runs))
    args = (*FINETUNE, "finetune.max_steps=4", "sweep=list.yaml", "run_dir=runs/sweep")
    assert "submitted 6 run(s)" in desk.submit(*args)
    rows = desk.wait("runs/sweep")
    (bad,) = [run for run in rows if "quoted" in run]
    assert {r.state for r in rows.values() if r.name != bad} == {"finished"}
    assert rows[bad].state == "failed"
    assert repr(HOSTILE) in rows[bad].reason
    assert repr(HOSTILE) in desk.submit("status=runs/sweep")
    assert not list(desk.path.rglob("pwned"))

    desk.submit("collect=runs/sweep")
    with open(desk.path / "runs/sweep/results.csv", newline="") as file:
        results = {row["run"]: row for row in csv.DictReader(file)}
    assert results.keys() == rows.keys()
    assert {run for run, row in results.items() if row["test.mae"]} == rows.keys() - {bad}
    assert results["target=density,seed=1"]["seed"] == "1"

    again = desk.submit(*args, "--dry-run")  # only what has not finished is left
    assert again.count("# target=") == 1 and f"# {bad}" in again


def test_a_cancelled_job_stays_cancelled(desk):
    """Both by our command and by Slurm's own; a run that waits never starts."""
    args = (*FINETUNE, "finetune.max_steps=100000", "finetune.epochs=100000")
    output = "runs/cancelled"
    desk.submit(*args, f"run_dir={output}", "sweep=[seed=[0,1,2]]", "array_parallelism=2")
    by_hand, by_us, waiting = "seed=0", "seed=1", "seed=2"
    assert desk.rows(output)[waiting].state == "pending"
    for name in (by_hand, by_us):
        desk.wait_for_step(f"{output}/{name}", 1)
    desk.cluster.run("scontrol", "hold", desk.job(output, waiting))
    desk.cluster.run("scancel", desk.job(output, by_hand))
    desk.wait_until(lambda: not desk.rows(output)[by_hand].active, "the run has ended", output)
    row = desk.rows(output)[by_us]
    assert row.state == "running" and row.node.startswith("node"), row
    assert "2 jobs ended" in desk.submit(f"cancel={output}")
    rows = desk.wait(output)
    assert {r.state for r in rows.values()} == {"cancelled"}
    for name in (by_hand, by_us):
        assert desk.events(output, name) == ["start", "stopped"]
    assert desk.events(output, waiting) == []


def test_sbatch_takes_what_users_write_and_refuses_with_a_reason(desk):
    args = (*FINETUNE, "run_dir=runs/hostile")
    taken = ("slurm.comment", "name", "account")
    desk.submit(*args, *(f"{setting}={HOSTILE}" for setting in taken), "slurm.hold=true")
    shown = desk.cluster.run("scontrol", "show", "job", desk.job("runs/hostile"))
    for name in ("Comment", "JobName", "Account"):
        assert f"{name}={HOSTILE}" in shown
    desk.submit("cancel=runs/hostile")
    for setting in ("partition", "constraint", "slurm.reservation"):
        with pytest.raises(ValueError, match="sbatch refused: "):
            desk.submit(*FINETUNE, "run_dir=runs/refused", f"{setting}={HOSTILE}")
    assert not list(desk.path.rglob("pwned"))


def test_a_run_in_a_directory_of_any_name(desk):
    """The job's own files have quotes and spaces in their paths; the run ends all the same."""
    output = 'runs/it\'s "quoted" $(touch pwned)'
    desk.submit(*FINETUNE, "finetune.max_steps=2", f"run_dir={output}")
    (row,) = desk.wait(output).values()
    assert (row.state, row.retries) == ("finished", ""), row
    assert not list(desk.path.rglob("pwned"))


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
    assert Submission.find(desk.path / "runs/nowhere") is None
