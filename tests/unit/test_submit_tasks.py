"""What runs on a node, and local cells: stops, crashes, failures, cancellation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.utils import DelayedSubmission, JobPaths

from launch import events, status
from launch.cluster import SubmitConfig, run_here, run_local, script, slurm_executor
from launch.events import EventLog, ends_of_turn, outcome_of, verdict
from launch.submission import ROOT, Submission, new_attempt
from launch.task import Task, progress, rank_environ, run_to_end
from models.registry import configure
from trainer import config


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (0, "finished"),
        (75, "stopped"),
        (-signal.SIGTERM, "stopped"),
        (-signal.SIGUSR2, "stopped"),
        (2, "failed"),
        (1, "crashed"),
        (-signal.SIGKILL, "crashed"),
        (-signal.SIGSEGV, "crashed"),
    ],
)
def test_outcomes(code, outcome):
    assert outcome_of(code) == outcome


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("no such label"), "failed"),
        (FileNotFoundError("no such file"), "failed"),
        (ConnectionError("rank 1 lost the other ranks"), "crashed"),
        (TimeoutError("the store does not answer"), "crashed"),
    ],
)
def test_a_job_that_lost_its_peers_is_not_one_that_someone_has_to_mend(error, outcome, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        config.run(main)
    assert outcome_of(end.value.code) == outcome
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("codes", "outcome"),
    [
        ({0: 0, 1: 0}, ("finished", None)),
        ({1: 1, 0: 0}, ("finished", None)),  # rank 0 has written all there is
        ({0: 1, 1: 2}, ("failed", 1)),  # rank 0 only lost rank 1, which knows why
        ({0: 75, 1: 75}, ("stopped", 0)),
        ({1: 1, 0: 75}, ("stopped", 0)),
        ({2: -9, 0: 1, 1: 1}, ("crashed", 2)),
        ({1: 0}, ("crashed", None)),  # rank 0 was killed before it could say so
        ({}, ("crashed", None)),
    ],
)
def test_a_turn_ends_as_those_say_who_know_most(tmp_path, codes, outcome):
    """Ranks, in order of time, and their exit codes."""
    for time, (rank, code) in enumerate(codes.items()):
        log = EventLog(tmp_path, "a", rank)
        log.note(outcome_of(75), job="1", turn=0, rank=rank, node="n", code=75)  # an earlier turn
        log.note("start", job="1", turn=1, rank=rank, node="n")
        log.note(outcome_of(code), job="1", turn=1, rank=rank, node="n", code=code, time=time)
    end = verdict(ends_of_turn(tmp_path, "a", "1", 1), 137)
    assert (end["event"], end.get("rank")) == outcome


def test_codes_are_those_of_the_jobs():
    from trainer.signals import REQUEUE

    assert events.REQUEUE == REQUEUE


def test_what_runs_on_a_node_imports_nothing_heavy():
    """Every process of a job loads it before the job itself."""
    code = "import sys, launch.task; sys.exit(bool({'torch', 'omegaconf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_signals_reach_the_script():
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\n"
        "os.kill(os.getppid(), signal.SIGUSR2)\n"
        "signal.pause()\n"
    )
    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        assert run_to_end([sys.executable, "-c", code], os.environ) == 75
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def environment(rank: int, size: int, nodes: int, job: str = "12") -> SimpleNamespace:
    return SimpleNamespace(
        raw_job_id=job,
        global_rank=rank,
        local_rank=rank % (size // nodes),
        num_tasks=size,
        num_nodes=nodes,
        hostnames=[f"127.0.0.{i + 1}" for i in range(nodes)],
    )


def test_ranks_meet_at_one_address():
    environs = [rank_environ(environment(r, 4, 2)) for r in range(4)]
    assert [e["RANK"] for e in environs] == ["0", "1", "2", "3"]
    assert [e["LOCAL_RANK"] for e in environs] == ["0", "1", "0", "1"]
    assert {e["WORLD_SIZE"] for e in environs} == {"4"}
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in environs} == {
        ("127.0.0.1", environs[0]["MASTER_PORT"])
    }


def test_neighbouring_jobs_and_turns_meet_at_other_ports(monkeypatch):
    ports = set()
    for turn in range(5):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(turn))
        environs = [rank_environ(environment(0, 1, 1, str(job))) for job in range(100, 400)]
        ports |= {e["MASTER_PORT"] for e in environs}
    assert len(ports) == 5 * 300
    assert all(20000 <= int(p) < 30000 for p in ports)  # below what systems hand out by themselves


def test_progress_is_what_is_complete(tmp_path):
    assert progress(str(tmp_path)) == ""
    (tmp_path / "run.json").write_text('{"finished": ["vae"]}')
    for name in ("joint-00000010", "joint-00000020"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/joint-00000010/COMPLETE").touch()
    assert progress(str(tmp_path)) == "vae,joint-00000010"


def test_crashes_count_where_nothing_was_gained(tmp_path):
    log = EventLog(tmp_path, "cell")
    log.note("start", job="1", progress="a")
    assert log.crashes("a") == 1
    assert log.crashes("b") == 0  # it came further before it crashed
    log.note("crashed", job="1")
    log.note("start", job="1", progress="a")  # the machine went away: no word of the end
    log.note("start", job="1", progress="a")
    assert log.crashes("a") == 3
    log.note("stopped", job="1")
    log.note("start", job="1", progress="a")
    assert log.crashes("a") == 1


def test_events_survive_a_cut_line(tmp_path):
    log = EventLog(tmp_path, "cell")
    log.note("start", job="1")
    with open(log.path, "a") as file:
        file.write('{"event": "fini')
    assert [e["event"] for e in log.read()] == ["start"]


# --- after a turn --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "codes", "noted", "exit_code"),
    [
        ("RUNNING None", {}, ["start", "crashed", "requeue"], 1),  # srun could start nothing
        ("RUNNING None", {0: 75}, ["start", "stopped", "requeue"], 75),
        ("RUNNING None", {0: 1, 1: 1}, ["start", "crashed", "requeue"], 1),
        ("RUNNING None", {0: 1, 1: 2}, ["start", "failed"], 2),
        ("RUNNING None", {0: 0, 1: 0}, ["start", "finished"], 0),
        (
            "COMPLETING None",
            {0: 75},
            ["start", "stopped"],
            75,
        ),  # or Slurm requeues it itself
        ("COMPLETING None", {0: 1}, ["start", "stopped"], 75),  # scancel, before it could listen
        ("TIMEOUT", {0: 75}, ["start", "stopped", "requeue"], 75),
        ("cancelled", {0: 75}, ["start", "stopped"], 75),  # by `cancel`, while Slurm lets it run
        ("cancelled", {}, ["start", "stopped"], 75),
    ],
)
def test_batch_script_asks_for_another_turn(tmp_path, state, codes, noted, exit_code):
    """The whole script in a shell, with programs in Slurm's place."""
    folder = tmp_path / 'it\'s "f" $(touch pwned)'
    task = Task("a", ("script.py",), str(folder), str(tmp_path / "run"), 10, 3)
    (folder / "logs").mkdir(parents=True)
    DelayedSubmission(task).dump(JobPaths(folder / "logs", "7").submitted_pickle)
    if state == "cancelled":
        (folder / "cancelled").touch()
    for rank, code in codes.items():
        EventLog(folder, "a", rank).note(
            outcome_of(code), job="7", turn=2, rank=rank, node="n", code=code
        )
    shown = {"TIMEOUT": "COMPLETING TimeLimit", "cancelled": "RUNNING None"}.get(state, state)
    for name, line in {
        "srun": "exit 1",
        "squeue": f"echo {shown}",
        "scontrol": f'echo "$@" >> "{tmp_path}/asked"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    settings = configure(SubmitConfig, {"job": "pretrain", "nodes": 2})
    done = subprocess.run(
        ["bash", "-c", script(slurm_executor(settings, "run", folder, ROOT), 1)],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_RESTART_COUNT": "2",
        },
    )
    assert done.returncode == exit_code
    log = EventLog(folder, "a").read()
    assert [e["event"] for e in log] == noted
    assert log[0]["node"] == "n[1-2]" and {e.get("turn", 2) for e in log} == {2}
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == (
        "requeue 7\n" if "requeue" in noted else ""
    )
    assert not list(tmp_path.rglob("pwned"))


# --- local processes -----------------------------------------------------------------------------

SCRIPT = """
import json, pathlib, sys, os, signal
run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True)
turns = run / "turns"
n = len(turns.read_text()) if turns.exists() else 0
turns.write_text("x" * (n + 1))
behaviour = json.loads(sys.argv[2])
what = behaviour[min(n, len(behaviour) - 1)]
if what == "progress":
    (run / "checkpoints" / f"vae-{n:08d}").mkdir(parents=True)
    (run / "checkpoints" / f"vae-{n:08d}" / "COMPLETE").touch()
    what = 1
if what == 0:
    (run / "run.json").write_text('{"identity": {"stages": ["vae"]}, "finished": ["vae"]}')
if what == "cancelled":
    pathlib.Path(str(run.parent) + ".submit", "cancelled").touch()
    what = 75
print("error: as planned", file=sys.stderr)
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (run / "waiting").touch()
    signal.pause()
sys.exit(what)
"""


def local(tmp_path: Path, behaviours: dict[str, list], **settings) -> tuple[Submission, list[str]]:
    """Runs cells whose turns end as given, on this machine; returns those that failed."""
    config = configure(SubmitConfig, {"job": "pretrain", "cluster": "local", **settings})
    (tmp_path / "script.py").write_text(SCRIPT)
    submission = Submission(Submission.folder_of(tmp_path / "runs"), "pretrain")
    tasks = []
    for cell, behaviour in behaviours.items():
        output = tmp_path / "runs" / cell
        submission.add(cell, str(output), {"x": cell}, {})
        argv = (str(tmp_path / "script.py"), str(output), json.dumps(behaviour))
        limits = config.max_requeues, config.max_crashes
        tasks.append(Task(cell, argv, str(submission.folder), str(output), *limits))
    submission.attempts.append(new_attempt("local", ROOT, {}))
    ids = submission.attempts[-1]["ids"]
    failed = run_local(config, tasks, submission.folder, ROOT, ids.__setitem__)
    submission.write()
    return submission, failed


def test_local_cells_stop_crash_fail_and_finish(tmp_path):
    submission, failed = local(
        tmp_path,
        {
            "good": [0],
            "stopped": [75, 75, 0],
            "crashing": [1, 1, 0],
            "hopeless": [1],
            "wrong": [2],
            "cancelled": ["cancelled"],
        },
        max_crashes=2,
        array_parallelism=2,
    )
    # A cancelled submission starts no more cells and no more turns; it was the last one.
    assert failed == ["hopeless", "wrong", "cancelled"] or set(failed) == {
        "hopeless",
        "wrong",
        "cancelled",
    }
    turns = {c: len((tmp_path / "runs" / c / "turns").read_text()) for c in submission.cells}
    assert turns == {
        "good": 1,
        "stopped": 3,
        "crashing": 3,
        "hopeless": 3,
        "wrong": 1,
        "cancelled": 1,
    }
    rows = {r.cell: r for r in status.statuses(tmp_path / "runs")}
    assert {c: r.state for c, r in rows.items()} == {
        "good": "finished",
        "stopped": "finished",
        "crashing": "finished",
        "hopeless": "crashed",
        "wrong": "failed",
        "cancelled": "cancelled",
    }
    assert rows["stopped"].retries == "2"
    assert rows["wrong"].reason == "error: as planned"
    text = status.table(list(rows.values()))
    assert "wrong: error: as planned" in text and "3 finished" in text


def test_crashes_with_progress_in_between_are_no_loop(tmp_path):
    _, failed = local(tmp_path, {"a": ["progress"] * 3 + [0]}, max_crashes=0)
    assert not failed


def test_turns_are_limited(tmp_path):
    submission, failed = local(tmp_path, {"a": [75]}, max_requeues=2)
    assert failed == ["a"]
    assert len((tmp_path / "runs/a/turns").read_text()) == 3
    assert EventLog(submission.folder, "a").read()[-1]["event"] == "gave up"
    assert status.statuses(tmp_path / "runs")[0].state == "failed"


def test_local_cells_may_stop_more_often_than_submitit_restarts_them(tmp_path):
    _, failed = local(tmp_path, {"a": [75] * 8 + [0]})
    assert not failed
    assert len((tmp_path / "runs/a/turns").read_text()) == 9
    assert status.statuses(tmp_path / "runs")[0].retries == "8"


def test_processes_of_a_cell_know_each_other(tmp_path):
    config = configure(SubmitConfig, {"job": "pretrain", "cluster": "local", "tasks_per_node": 2})
    code = "import os, sys; open(f'{sys.argv[1]}-{os.environ[\"RANK\"]}', 'w').write(' '.join("
    code += "os.environ[k] for k in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"
    (tmp_path / "script.py").write_text(code)
    argv = (str(tmp_path / "script.py"), str(tmp_path / "rank"))
    one = Task("a", argv, str(tmp_path / "f"), str(tmp_path / "out"), 0, 0)
    assert run_local(config, [one], tmp_path / "f", ROOT, lambda *_: None) == []
    first, second = ((tmp_path / f"rank-{r}").read_text() for r in (0, 1))
    assert first == second and first.startswith("2 127.0.0.1 ")


def test_cancel_ends_local_cells(tmp_path):
    """From another process, as a user would: the run is stopped in order, waiting cells do not
    start."""
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_submit_tasks import local\n"
        "local(Path(sys.argv[1]), {'a': ['wait'], 'b': [0]})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        while not (tmp_path / "runs/a/waiting").exists():
            assert process.poll() is None
        submission = Submission(Submission.folder_of(tmp_path / "runs"), "pretrain")
        events = EventLog(submission.folder, "a").read()
        for cell in ("a", "b"):
            submission.add(cell, str(tmp_path / "runs" / cell), {}, {})
        submission.attempts.append(new_attempt("local", ROOT, {"a": events[0]["job"]}))
        submission.write()
        assert status.statuses(tmp_path / "runs")[0].state == "running"
        assert status.cancel(tmp_path / "runs") == 1
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert [e["event"] for e in EventLog(submission.folder, "a").read()] == ["start", "stopped"]
    assert not (tmp_path / "runs/b").exists()
    assert {r.state for r in status.statuses(tmp_path / "runs")} == {"cancelled"}


def test_debug_runs_here_and_goes_on_after_a_failure(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys\nassert sys.argv[1] != 'raise', 'a bug'\nsys.exit(int(sys.argv[1]))"
    )
    tasks = [
        Task(c, (str(tmp_path / "script.py"), c), str(tmp_path), "", 0, 0)
        for c in ("raise", "2", "0")
    ]
    assert run_here(tasks, tmp_path) == ["raise", "2"]
