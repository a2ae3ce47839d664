"""What runs on a node: one process of a job, started by submitit, that starts a launch script and
asks for another turn when it stops before its end.

submitit pickles a `Task` on its way to the node, so it holds names and numbers only, and this
module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import DelayedSubmission

REQUEUE = 75
"""Exit code of a job that stopped before its end and can be continued (trainer/signals.py)."""

USER_ERROR = 2
"""Exit code of a job that a person has to mend (trainer/config.py)."""

_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Task:
    """One cell of a submission, as every process of its job runs it."""

    cell: str
    argv: tuple[str, ...]
    """Launch script and its arguments, after the interpreter."""
    folder: str
    """The submission's folder."""
    output: str
    """What the job writes: run directory, data set or file."""
    max_requeues: int
    max_crashes: int

    def __call__(self) -> None:
        """Runs the script to its end, or until it stops; then requeues the job or exits with the
        script's code."""
        if cancelled(self.folder):
            raise SystemExit(REQUEUE)
        env = JobEnvironment()
        log = EventLog(self.folder, self.cell)
        environ = {**os.environ, **rank_environ(env)}
        if env.global_rank == 0:
            environ.update(_end_of_job(env, environ))
            log.note(
                "start",
                job=env.job_id,
                node=os.environ.get("SLURM_JOB_NODELIST") or env.hostname,
                progress=progress(self.output),
            )
        code = run_to_end([sys.executable, *self.argv], environ)
        outcome = outcome_of(code)
        if env.global_rank == 0:
            log.note(outcome, job=env.job_id, code=code, progress=progress(self.output))
        if outcome == "stopped" or (outcome == "crashed" and self._may_restart(log)):
            _wait_for_peers(env, code)
            self._requeue(env, log, float(environ.get("SLURM_JOB_END_TIME", "inf")))
        raise SystemExit(code if code >= 0 else 128 - code)

    def checkpoint(self, *args: Any, **kwargs: Any) -> DelayedSubmission:
        """submitit's own way of continuing a job: the same task again."""
        return DelayedSubmission(self)

    def _may_restart(self, log: EventLog) -> bool:
        return log.crashes(progress(self.output)) <= self.max_crashes

    def _requeue(self, env: JobEnvironment, log: EventLog, end: float) -> None:
        """Asks the scheduler for another turn, unless the job was ended on purpose."""
        left = self.max_requeues - len(log.starts(env.job_id))
        if cancelled(self.folder) or (env.name() == "slurm" and not _still_wanted(env, end)):
            return
        if left < 0:
            log.note("gave up", job=env.job_id, after=self.max_requeues)
            return
        log.note("requeue", job=env.job_id, rank=env.global_rank)
        env._requeue(left)


def run_to_end(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code of a command; signals that ask this process to stop are passed on to it."""
    early: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, frame: object) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    for stop in _STOP:
        signal.signal(stop, pass_on)
    process = subprocess.Popen(command, env=dict(environ))
    for number in early:
        process.send_signal(number)
    code = process.wait()
    for stop in _STOP:  # from here on nothing is lost when this process ends
        signal.signal(stop, signal.SIG_DFL if stop == signal.SIGTERM else signal.SIG_IGN)
    return code


def outcome_of(code: int) -> str:
    """`finished`; `stopped`: asked to, and can be continued; `failed`: someone has to mend
    something; `crashed`: anything else, perhaps only because another process went away."""
    if code == 0:
        return "finished"
    if code == REQUEUE or -code in _STOP:  # a signal before the script could listen
        return "stopped"
    return "failed" if code == USER_ERROR else "crashed"


def rank_environ(env: JobEnvironment) -> dict[str, str]:
    """What a launcher sets for this process: its rank, and where rank 0 is to be met. The port
    follows from the job and its turn, so that all processes know it without asking."""
    number, turn = int(env.raw_job_id), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return {
        "RANK": str(env.global_rank),
        "WORLD_SIZE": str(env.num_tasks),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.num_tasks // env.num_nodes),
        "MASTER_ADDR": address(env.hostnames[0]) if env.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(20000 + (7 * number + turn) % 10000),
        "PYTHONUNBUFFERED": "1",
    }


def address(node: str) -> str:
    """A node's name, or the address that Slurm knows it by where no name service does."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        for word in _ask("scontrol", "--oneliner", "show", "node", node).split():
            if word.startswith("NodeAddr="):
                return word.removeprefix("NodeAddr=")
    return node


def progress(output: str) -> str:
    """How far a run is: stages that are finished and its newest complete checkpoint."""
    path = Path(output)
    finished: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        finished = json.loads((path / "run.json").read_text(encoding="utf-8"))["finished"]
    complete = sorted(p.parent.name for p in path.glob("checkpoints/*/COMPLETE"))
    return ",".join([*finished, *complete[-1:]])


def cancelled(folder: str | Path) -> bool:
    """Whether the submission was cancelled."""
    return (Path(folder) / "cancelled").exists()


class EventLog:
    """What happened to a cell, one JSON object a line: FOLDER/events/<cell>.jsonl."""

    def __init__(self, folder: str | Path, cell: str) -> None:
        self.path = Path(folder) / "events" / f"{cell}.jsonl"

    def note(self, event: str, **values: Any) -> None:
        """Appends an event with the time (seconds since 1970)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All events, oldest first; lines that a kill cut off are left out."""
        events = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    events.append(json.loads(line))
        return events

    def starts(self, job: str) -> list[dict[str, Any]]:
        """The turns of a job so far."""
        return [e for e in self.read() if e["event"] == "start" and e["job"] == job]

    def crashes(self, progress: str) -> int:
        """Turns in a row, up to the last, that began where the cell still is and ended without
        having been asked to."""
        count = 0
        for event in reversed(self.read()):
            if event["event"] in ("stopped", "finished"):
                break
            if event["event"] == "start":
                if event["progress"] != progress:
                    break
                count += 1
        return count


def _wait_for_peers(env: JobEnvironment, code: int) -> None:
    """Gives the other processes of a job the time to come to their own ends.

    After an orderly stop rank 0 may still be writing, and asks for all. After a crash a process
    that knows the reason exits with it, which ends the job. In both cases the others act only if
    nothing has happened meanwhile.
    """
    if env.num_tasks == 1 or env.name() != "slurm":
        return
    if code == REQUEUE:
        time.sleep(0 if env.global_rank == 0 else 600)
    else:
        time.sleep(10 if env.global_rank == 0 else 30)


def _still_wanted(env: JobEnvironment, end: float) -> bool:
    """Whether Slurm's job is one to be continued: it runs, or only its time is up. One that ends
    otherwise was cancelled, or is being requeued by Slurm itself."""
    state = _ask("squeue", "--noheader", "--jobs", env.job_id, "--format", "%T").strip()
    return state == "RUNNING" or time.time() > end - 5


def _end_of_job(env: JobEnvironment, environ: Mapping[str, str]) -> dict[str, str]:
    """SLURM_JOB_END_TIME, which Slurm sets itself from version 23 on."""
    if env.name() != "slurm" or "SLURM_JOB_END_TIME" in environ:
        return {}
    text = _ask("squeue", "--noheader", "--jobs", env.job_id, "--format", "%e").strip()
    with contextlib.suppress(ValueError):
        return {"SLURM_JOB_END_TIME": str(int(datetime.fromisoformat(text).timestamp()))}
    return {}


def _ask(*command: str) -> str:
    """Output of a Slurm command; empty if it fails, with its complaint in the job's log."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    return done.stdout if done.returncode == 0 else ""
