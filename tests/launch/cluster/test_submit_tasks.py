"""What runs on a node, and what decides whether a job gets another attempt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from submitit.core.utils import DelayedSubmission, JobPaths

from crysforge.datapipe.common.config import configure
from crysforge.launch.cluster import events
from crysforge.launch.cluster.code import ROOT
from crysforge.launch.cluster.config import SubmitConfig
from crysforge.launch.cluster.events import EventLog, ends_of_attempt, outcome_of, verdict
from crysforge.launch.cluster.executors import script, slurm_executor
from crysforge.launch.cluster.worker import Task, progress, rank_environ, run_to_end
from crysforge.trainer.base import script as config


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
    for when, (rank, code) in enumerate(codes.items()):
        log = EventLog(tmp_path, "a", rank)
        log.note(
            outcome_of(75), job="1", attempt=0, rank=rank, node="n", code=75
        )  # an earlier attempt
        log.note("start", job="1", attempt=1, rank=rank, node="n")
        log.note(outcome_of(code), job="1", attempt=1, rank=rank, node="n", code=code, time=when)
    end = verdict(ends_of_attempt(tmp_path, "a", "1", 1), 137)
    assert (end["event"], end.get("rank")) == outcome


def test_codes_are_those_of_the_jobs():
    from crysforge.trainer.base.signals import REQUEUE

    assert events.REQUEUE == REQUEUE


def test_what_runs_on_a_node_imports_nothing_heavy():
    """Every process of a job loads it before the job itself."""
    code = (
        "import sys, crysforge.launch.cluster.worker\n"
        "sys.exit(bool({'torch', 'omegaconf'} & set(sys.modules)))"
    )
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
    for attempt in range(5):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
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


def test_progress_is_of_the_stage_under_way(tmp_path):
    """Checkpoints of finished stages may stay, and others are set aside."""
    (tmp_path / "run.json").write_text('{"finished": ["vae"]}')
    for name in ("vae-00000900", "joint-00000090.superseded", "joint-00000080.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMPLETE").touch()
    assert progress(str(tmp_path)) == "vae"
    (tmp_path / "checkpoints/joint-00000010").mkdir()
    (tmp_path / "checkpoints/joint-00000010/COMPLETE").touch()
    assert progress(str(tmp_path)) == "vae,joint-00000010"


def test_crashes_count_where_nothing_was_gained(tmp_path):
    log = EventLog(tmp_path, "a")
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
    log = EventLog(tmp_path, "a")
    log.note("start", job="1")
    with open(log.path, "a") as file:
        file.write('{"event": "fini')
    assert [e["event"] for e in log.read()] == ["start"]


@pytest.mark.parametrize(
    ("attempts", "last"),
    [
        ([(75, 60, 0), (75, 60, 0)], "gave up"),
        ([(-signal.SIGUSR2, 60, 0), (-signal.SIGUSR2, -60, 0)], "gave up"),  # could not listen yet
        ([(75, 60, 0), (75, 60, 1)], "requeue"),  # it made a step
        ([(75, 60, 0), (75, 60, 1), (75, 60, 0)], "requeue"),
        ([(75, 60, 0), (75, 60, 1), (75, 60, 0), (75, 60, 0)], "gave up"),
        ([(75, 80000, 0)] * 4, "requeue"),  # not for its time limit: others wanted the node
        ([(75, None, 0)] * 4, "requeue"),  # no limit
        ([(75, 60, 0), (1, 60, 0), (75, 60, 0)], "requeue"),
    ],
)
def test_turns_too_short_to_get_anywhere_are_not_repeated(
    tmp_path, monkeypatch, capsys, attempts, last
):
    """Exit code of each attempt, seconds that it had left, and whether it gained a checkpoint."""
    monkeypatch.setattr("crysforge.launch.cluster.worker._ask", lambda *command: "RUNNING None")
    env = SimpleNamespace(job_id="7", hostname="n", name=lambda: "slurm")
    task = Task("a", ("script.py",), str(tmp_path), str(tmp_path / "run"), 1000, 3)
    log = EventLog(tmp_path, "a")
    log.note(
        "stopped", job="6", attempt=0, code=75, no_progress=True
    )  # submitted before, with less time
    for attempt, (code, left, gained) in enumerate(attempts):
        ends = None if left is None else int(time.time() + left)
        log.note("start", job="7", attempt=attempt, ends=ends, progress=progress(task.output))
        if gained:
            path = tmp_path / "run" / "checkpoints" / f"vae-{attempt:08d}"
            path.mkdir(parents=True)
            (path / "COMPLETE").touch()
        here = {"job": "7", "attempt": attempt, "rank": 0, "node": "n"}
        EventLog(tmp_path, "a", 0).note(outcome_of(code), **here, code=code)
        task.settle(env, attempt, 0)
        assert (log.read()[-1]["event"] == "requeue") == (
            attempt < len(attempts) - 1 or last != "gave up"
        )
    assert log.read()[-1]["event"] == last
    said = "error: not started again: twice its time was up before it got beyond "
    assert (said in capsys.readouterr().out) == (last == "gave up")


# --- after an attempt ----------------------------------------------------------------------------


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
            outcome_of(code), job="7", attempt=2, rank=rank, node="n", code=code
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
    assert log[0]["node"] == "n[1-2]" and {e.get("attempt", 2) for e in log} == {2}
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == (
        "requeue 7\n" if "requeue" in noted else ""
    )
    assert not list(tmp_path.rglob("pwned"))
