"""The record of a submission: states, results, snapshots."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
import time
from pathlib import Path

import pytest

from crysforge.launch.cluster import code as running
from crysforge.launch.cluster import status
from crysforge.launch.cluster.events import EventLog
from crysforge.launch.cluster.runs import SILENT_S, read_run
from crysforge.launch.cluster.submission import Submission, new_entry
from crysforge.trainer.base.distributed import World
from crysforge.trainer.runs import logger
from tests.launch.cluster.test_submit import FINETUNE, ask


def submitted(tmp_path: Path, names: dict[str, str], cluster: str = "slurm") -> Submission:
    submission = Submission(Submission.folder_of(tmp_path / "runs"), "finetune")
    for name in names:
        submission.add(name, str(tmp_path / "runs" / name), {"seed": name}, {"seed": 0})
    submission.history.append(new_entry(cluster, running.ROOT, names))
    submission.write()
    return submission


def test_record_is_found_and_moves_with_its_runs(tmp_path):
    written = submitted(tmp_path / "here", {"a": "1_0", "b": "1_1"})
    assert Submission.find(tmp_path / "here/runs") == written
    assert Submission.find(tmp_path / "here/runs.submit") == written
    (tmp_path / "here").rename(tmp_path / "there")
    moved = Submission.find(tmp_path / "there/runs")
    assert moved is not None and moved.output("a") == tmp_path / "there/runs/a"
    assert Submission.find(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', '{"schema": 1}'])
def test_a_broken_record_is_named(tmp_path, text):
    submission = submitted(tmp_path, {"a": "1"})
    (submission.folder / "submission.json").write_text(text)
    with pytest.raises(ValueError, match=r"submission\.json"):
        Submission.find(tmp_path / "runs")


@pytest.mark.parametrize(
    ("slurm", "events", "state"),
    [
        ("PENDING", [], "pending"),
        ("RUNNING", ["start"], "running"),
        ("PENDING", ["start", "stopped", "requeue"], "pending"),
        ("FAILED", ["start", "failed"], "failed"),
        ("FAILED", ["start", "crashed"], "crashed"),
        ("CANCELLED", ["start"], "cancelled"),
        ("CANCELLED", [], "cancelled"),
        ("TIMEOUT", ["start"], "timeout"),
        ("OUT_OF_MEMORY", ["start"], "out of memory"),
        ("", ["start", "failed"], "failed"),
        ("", ["start", "stopped"], "stopped"),
        ("", ["start"], "lost"),
        ("", [], "lost"),
        (None, ["start"], "unknown"),
        (None, ["start", "failed"], "failed"),
    ],
)
def test_states(tmp_path, monkeypatch, slurm, events, state):
    """By what Slurm knows ("": it has forgotten; None: it cannot be asked) and what was noted."""
    submission = submitted(tmp_path, {"a": "1"})
    known = None if slurm is None else {"1": (slurm, "node1")} if slurm else {}
    monkeypatch.setattr(status, "slurm_states", lambda ids: known)
    for event in events:
        EventLog(submission.folder, "a").note(event, job="1", node="node1", progress="")
    row = status.statuses(tmp_path / "runs")[0]
    assert row.state == state
    assert row.active == (state in ("pending", "running", "unknown"))


def finish(run: Path, mae: float) -> None:
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"identity": {}, "finished": ["finetune"]}')
    line = {"stage": "finetune", "step": 7, "train/loss": 0.5, "val/loss": 0.4, "val/mae/gap": 0.3}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    metrics = {"units": {"gap": "eV"}, "test": {"mae": mae, "n": 3}, "targets": ["gap"]}
    (run / "metrics.json").write_text(json.dumps(metrics))


def test_table_and_results_after_the_fact(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "slurm_states", lambda ids: {})
    submitted(tmp_path, {"a": "1_0", "b": "1_1"})
    finish(tmp_path / "runs/a", 0.25)
    rows = {r.name: r for r in status.statuses(tmp_path / "runs")}
    assert (rows["a"].state, rows["a"].run.step, rows["a"].run.value) == (
        "finished",
        "finetune 7",
        "test MAE 0.25 eV",
    )
    path, count, done = status.collect(tmp_path / "runs")
    assert (count, done) == (2, 1)
    with open(path, newline="") as file:
        table = {r["run"]: r for r in csv.DictReader(file)}
    assert (table["a"]["test.mae"], table["a"]["seed"], table["a"]["targets"]) == (
        "0.25",
        "a",
        "gap",
    )
    assert (table["b"]["test.mae"], table["b"]["state"]) == ("", "lost")


def test_status_and_collect_work_on_runs_that_were_not_submitted(tmp_path):
    finish(tmp_path / "runs/a", 0.25)
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/b/run.json").write_text('{"identity": {"stages": ["vae"]}, "finished": []}')
    rows = {r.name: r.state for r in status.statuses(tmp_path / "runs")}
    assert rows == {"a": "finished", "b": "unfinished"}
    assert status.collect(tmp_path / "runs")[1:] == (2, 1)
    with pytest.raises(ValueError, match="nowhere"):
        status.statuses(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="was not submitted"):
        status.cancel(tmp_path / "runs")


def test_running_value_is_of_the_newest_stage(tmp_path):
    lines = [
        {"stage": "vae", "step": 9, "val/loss": 1.0},
        {"stage": "joint", "step": 2, "train/loss": 5.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    state = read_run(tmp_path)
    assert (state.step, state.value) == ("joint 2", "loss 5")


def log_a_run(run: Path, monkeypatch) -> None:
    """As two ranks of a training log it, in their second start, after one on four ranks."""
    monkeypatch.setattr(logger, "BEAT_S", 0.0)
    run.mkdir(parents=True, exist_ok=True)
    for rank in (3, 2, 1, 0):
        log = logger.Logger(run, "vae", 0, 50, World(rank, 4))
        log.event("start", step=0, host=f"old{rank}", ranks=4, device="cuda:0")
        log.event("quarantine", step=1, item=rank % 2, reason="no edges")
        log.close()
    for rank in (0, 1):
        log = logger.Logger(run, "vae", 10, 50, World(rank, 2))
        log.event("resume", step=10, host=f"new{rank}", ranks=2, device="cpu")
        log.event("quarantine", step=11, item=rank, reason="no edges")
        speed = {"speed/steps_per_s": 4.0, "speed/data_wait": 0.031, "memory/peak_gb": 1.234}
        log.scalars(20, {"train/loss": 2.0, "optim/skipped": 3.0, **speed})
        log.scalars(20, {"val/loss": 1.5})
        log.heartbeat(21)
        log.close()


def test_a_run_shows_how_far_how_fast_and_where(tmp_path, monkeypatch):
    log_a_run(tmp_path / "run", monkeypatch)
    state = read_run(tmp_path / "run")
    assert (state.step, state.value) == ("vae 21/50", "val loss 1.5")
    assert (state.seconds, state.wait, state.memory) == ("0.25", "3%", "1.23")
    assert (state.skipped, state.quarantined) == ("3", "2")  # each crystal once
    assert (state.nodes, state.devices) == ("new0,new1", "2 cpu")
    assert 0 <= state.silent < SILENT_S


def test_gpus_are_called_by_their_name(tmp_path):
    for rank, gpu in enumerate(["NVIDIA L40", "NVIDIA L40", "NVIDIA H200"]):
        with contextlib.closing(logger.Logger(tmp_path, "vae", 0, 50, World(rank, 3))) as log:
            log.event("start", step=0, host="a", ranks=3, device=f"cuda:{rank}", gpu=gpu)
    assert read_run(tmp_path).devices == "2 NVIDIA L40, 1 NVIDIA H200"


@pytest.mark.parametrize("name", ["metrics.jsonl", "heartbeat.json", "events/rank-0000.jsonl"])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stage": 1}', '{"event": []}', "\x00\xff{"])
def test_a_damaged_file_hides_neither_its_run_nor_others(tmp_path, monkeypatch, name, content):
    for run in ("a", "b"):
        log_a_run(tmp_path / run, monkeypatch)
        (tmp_path / run / "run.json").write_text('{"identity": {}, "finished": []}')
    (tmp_path / "a" / name).write_text(content)
    rows = status.statuses(tmp_path)
    assert [r.name for r in rows] == ["a", "b"]
    assert rows[1].run.step == "vae 21/50"
    assert status.table(rows).splitlines()[1].startswith("a ")


def test_the_table_leaves_out_what_says_nothing(tmp_path, monkeypatch):
    rows = [status.RunStatus("a", "pending"), status.RunStatus("b", "pending")]
    assert status.table(rows).split("\n") == [
        "run  state",
        "a    pending",
        "b    pending",
        "2 pending",
    ]
    log_a_run(tmp_path, monkeypatch)
    rows[0].run = read_run(tmp_path)
    head, first = status.table(rows).split("\n")[:2]
    assert head.split("  ")[-1] == "on" and first.endswith("2 cpu")
    assert "retries" not in head and "quarantined" in head


def test_a_running_cell_that_makes_no_step_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "slurm_states", lambda ids: {"1": ("RUNNING", "node1")})
    submitted(tmp_path, {"a": "1"})
    log_a_run(tmp_path / "runs/a", monkeypatch)
    assert not status.statuses(tmp_path / "runs")[0].reason
    beat = tmp_path / "runs/a/heartbeat.json"
    beat.write_text(json.dumps({**json.loads(beat.read_text()), "time": time.time() - 3600}))
    assert status.statuses(tmp_path / "runs")[0].reason == "no step for 60 minutes"


def test_a_crash_names_the_rank_that_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "slurm_states", lambda ids: {"1": ("FAILED", "")})
    submission = submitted(tmp_path, {"a": "1"})
    log = EventLog(submission.folder, "a")
    log.note("start", job="1", attempt=0, node="node[1-2]", progress="")
    log.note("crashed", job="1", attempt=0, rank=3, node="node2", code=-9, progress="")
    (submission.folder / "logs").mkdir()
    for rank in (0, 3):
        (submission.folder / f"logs/1_{rank}_log.out").write_text(f"error: of rank {rank}\nbye\n")
    row = status.statuses(tmp_path / "runs")[0]
    assert row.reason == "rank 3 on node2: killed by signal 9: error: of rank 3"


def test_a_job_that_is_not_started_again_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "slurm_states", lambda ids: {"1": ("FAILED", "")})
    log = EventLog(submitted(tmp_path, {"a": "1"}).folder, "a")
    log.note("start", job="1", attempt=0, node="n", progress="")
    log.note("stopped", job="1", attempt=0, rank=0, node="n", code=75, progress="")
    log.note("gave up", job="1", reason="its time was up")
    row = status.statuses(tmp_path / "runs")[0]
    assert (row.state, row.reason) == ("failed", "not started again: its time was up")


def test_cancel_asks_slurm_of_its_own_jobs_and_says_if_it_does_not_answer(tmp_path, monkeypatch):
    submission = submitted(tmp_path, {"a": "debug"}, cluster="debug")
    submission.history += [new_entry("local", running.ROOT, {"a": "0"})]
    submission.history += [new_entry("slurm", running.ROOT, {"a": "4"})]
    submission.history += [new_entry("slurm", running.ROOT, {"a": "5"})]
    submission.write()
    known, done = {"4": ("COMPLETED", ""), "5": ("RUNNING", "n")}, []
    monkeypatch.setattr(status, "slurm_states", lambda ids: {i: known[i] for i in ids})
    ended = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(status.subprocess, "run", lambda c, **_: done.append(c) or ended)
    assert status.cancel(tmp_path / "runs") == 1
    assert done == [["scancel", "5"]]
    monkeypatch.setattr(status, "slurm_states", lambda ids: None)
    with pytest.raises(ValueError, match="squeue does not answer: no Slurm job was cancelled"):
        status.cancel(tmp_path / "runs")
    assert (submission.folder / "cancelled").exists()


def test_a_turn_that_nobody_summed_up_ended_as_its_processes_say(tmp_path, monkeypatch):
    """The batch script was killed before it could."""
    monkeypatch.setattr(status, "slurm_states", lambda ids: {})
    submission = submitted(tmp_path, {"a": "1"})
    EventLog(submission.folder, "a").note("start", job="1", attempt=0, node="n", progress="")
    assert status.statuses(tmp_path / "runs")[0].state == "lost"
    EventLog(submission.folder, "a", 0).note(
        "stopped", job="1", attempt=0, rank=0, node="n", code=75
    )
    assert status.statuses(tmp_path / "runs")[0].state == "stopped"


def test_what_has_finished_or_still_runs_is_not_submitted_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = {"1_1": ("RUNNING", "n"), "1_2": ("FAILED", "n")}
    monkeypatch.setattr(status, "slurm_states", lambda ids: known)
    submitted(tmp_path, {"seed=0": "1_0", "seed=1": "1_1", "seed=2": "1_2"})
    finish(tmp_path / "runs/seed=0", 0.25)
    asked = ask(*FINETUNE, "run_dir=runs", "sweep=[seed=[0,1,2,3]]")
    left = asked.left(asked.submission(), asked.runs())
    assert [run.name for run in left] == ["seed=2", "seed=3"]
    assert "seed=0: finished already" in capsys.readouterr().out
    monkeypatch.setattr(status, "slurm_states", lambda ids: None)
    with pytest.raises(ValueError, match="squeue does not answer"):
        asked.left(asked.submission(), asked.runs())
    with pytest.raises(ValueError, match="is of a finetune job"):
        ask("job=pretrain", "data=D", "run_dir=runs").submission()


def test_snapshot_is_the_code_as_it_is(tmp_path, monkeypatch):
    """Edited and new files are in it, ignored and deleted ones are not; later edits are not."""
    root = tmp_path / "repository"
    for name in ("launch/a.py", "launch/b.py", "docs/c.md", ".gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("*.pyc\nruns/\n")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    (root / "launch/a.py").write_text("edited")
    (root / "launch/b.py").unlink()
    (root / "launch/new.py").write_text("new")
    (root / "launch/x.pyc").write_text("ignored")
    (root / "scratch.txt").write_text("outside of the packages")
    monkeypatch.setattr(running, "ROOT", root)
    code = Submission(tmp_path / "f").snapshot()
    (root / "launch/a.py").write_text("edited later")
    found = {str(p.relative_to(code)) for p in code.rglob("*") if p.is_file()}
    assert found == {"launch/a.py", "launch/new.py", "docs/c.md", ".gitignore"}
    assert (code / "launch/a.py").read_text() == "edited"


def test_snapshot_of_an_installed_package_has_the_layout_of_a_checkout(tmp_path, monkeypatch):
    """An installation has no repository around it, and its parts lie inside the package."""
    home = tmp_path / "site-packages" / "crysforge"
    for name in (
        "__init__.py",
        "launch/submit.py",
        "models/__init__.py",
        "configs/pretrain/a.yaml",
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    monkeypatch.setattr(running, "HOME", home)
    monkeypatch.setattr(running, "ROOT", home)
    code = Submission(tmp_path / "f").snapshot()
    found = {str(p.relative_to(code)): p.read_text() for p in code.rglob("*") if p.is_file()}
    names = {"launch/submit.py", "models/__init__.py", "configs/pretrain/a.yaml"}
    assert found == {**{n: n for n in names}, "crysforge/__init__.py": "__init__.py"}
