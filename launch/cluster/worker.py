"""What runs on a node: one process of a job, started by submitit, that starts a launch script; and
what decides after an attempt whether the job gets another one.

On Slurm the batch script decides (`python -m crysforge.launch.cluster.worker`, when srun is over):
it outlives any process of the job, and lives where Slurm itself notices if it does not. On one
machine rank 0 does.

submitit pickles a `Task` on its way to the node, so it holds names and numbers only, and this
module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
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
from submitit.core.utils import DelayedSubmission, JobPaths

from crysforge.datapipe.common.checked import Name
from crysforge.datapipe.common.processes import Parent, Process, start_watching
from crysforge.datapipe.common.safe_read import parse_json, read_mapping
from crysforge.launch.cluster.events import EventLog, ends_of_attempt, outcome_of, verdict

_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_TAG = re.compile(r"([a-z][a-z0-9_]*)-\d{8}")
"""Name of a checkpoint (trainer/runs/saved.py)."""
END = "SLURM_JOB_END_TIME"
SUPERVISOR = "CRYSFORGE_SUBMIT"
"""Environment variable that says which process carries runs out on this machine."""
LATE_S = 600.0
"""Seconds before its time limit from which on an attempt that stops is taken to end for that."""


@dataclass(frozen=True)
class Task:
    """One run of a submission, as every process of its job runs it."""

    name: str
    argv: tuple[str, ...]
    """Launch script and its arguments, after the interpreter."""
    folder: str
    """The submission's folder."""
    output: str
    """What the job writes: run directory, data set or file."""
    max_requeues: int
    max_crashes: int

    def __call__(self) -> None:
        """Runs the script to its end, or until it stops, and exits with its code."""
        env = JobEnvironment()
        if env.name() == "local":
            _end_with_submit(int(env.job_id))
        if cancelled(self.folder):
            raise SystemExit(outcome_code("stopped"))
        environ = {**os.environ, **rank_environ(env)}
        own = EventLog(self.folder, self.name, env.global_rank)
        attempt = restarts() if env.name() == "slurm" else len(own.starts(env.job_id))
        here: dict[str, Any] = {"job": env.job_id, "attempt": attempt}
        if env.global_rank == 0:
            ends = _end_of_job(env)
            environ |= {} if ends is None else {END: str(ends)}
            self._note_start(env, here, ends)
        here |= {"rank": env.global_rank, "node": _node(env)}
        own.note("start", **here, pid=os.getpid())
        heard: list[int] = []
        code = run_to_end([sys.executable, *self.argv], environ, heard)
        own.note(outcome_of(code), **here, code=code)
        if env.name() != "slurm" and env.global_rank == 0:
            self._wait_for_peers(env, attempt, outcome_of(code))
            self.settle(env, attempt, code, ended=signal.SIGTERM in heard)
        raise SystemExit(code if code >= 0 else 128 - code)

    def settle(self, env: JobEnvironment, attempt: int, code: int, ended: bool = False) -> str:
        """After an attempt: notes how it ended, and asks for another one if the job stopped before
        its end or crashed, perhaps only since a machine did. Returns the outcome.

        Args:
            attempt: number of the attempt, from 0.
            code: exit code of the step, for where no process has a word of its own.
            ended: whether `submit` has told it to end.
        """
        log = EventLog(self.folder, self.name)
        here = {"job": env.job_id, "attempt": attempt}
        start = next((e for e in log.starts(env.job_id) if e.get("attempt") == attempt), None)
        if start is None:  # rank 0 never began
            self._note_start(env, here)
        end = verdict(ends_of_attempt(self.folder, self.name, env.job_id, attempt), code)
        open_end = end["event"] in ("stopped", "crashed")
        wanted = open_end and not ended and not cancelled(self.folder) and _still_wanted(env)
        if open_end and not wanted:  # what ended it made it crash, perhaps
            end["event"] = "stopped"
        end |= {**here, "progress": progress(self.output)}
        if wanted and end["event"] == "stopped" and start is not None:
            late = time.time() > (start.get("ends") or math.inf) - LATE_S
            end["no_progress"] = late and end["progress"] == start.get("progress")
        log.note(**end)
        crashes = log.crashes(end["progress"])
        if wanted and (end["event"] == "stopped" or crashes <= self.max_crashes):
            self._requeue(env, log)
        return end["event"]

    def _note_start(
        self, env: JobEnvironment, here: Mapping[str, Any], ends: int | None = None
    ) -> None:
        nodes = os.environ.get("SLURM_JOB_NODELIST") or env.hostname
        log = EventLog(self.folder, self.name)
        log.note("start", **here, node=nodes, ends=ends, progress=progress(self.output))

    def checkpoint(self, *args: Any, **kwargs: Any) -> DelayedSubmission:
        """submitit's own way of continuing a job: the same task again."""
        return DelayedSubmission(self)

    def _requeue(self, env: JobEnvironment, log: EventLog) -> None:
        """Asks the scheduler for another attempt, unless the job had all it may have, or its
        attempts are too short to get anywhere."""
        left = self.max_requeues - len(log.starts(env.job_id))
        reason = ""
        if left < 0:
            reason = f"it was started again {self.max_requeues} times (max_requeues)"
        elif log.without_progress(env.job_id) >= 2:
            where = progress(self.output) or "its start"
            reason = f"twice its time was up before it got beyond {where}: raise the time limit, "
            reason += "unless the log says why nothing was saved"
        if reason:
            log.note("gave up", job=env.job_id, reason=reason)
            print(f"error: not started again: {reason}", flush=True)
            return
        log.note("requeue", job=env.job_id)
        if env.name() == "slurm":
            _ask("scontrol", "requeue", env.job_id)
        else:
            env._requeue(left)  # exits

    def _wait_for_peers(self, env: JobEnvironment, attempt: int, outcome: str) -> None:
        """After a crash of rank 0, gives the others the time to note why: one may know the reason,
        and rank 0 only that it lost them."""
        deadline = time.monotonic() + 10
        while outcome == "crashed" and time.monotonic() < deadline:
            ends = ends_of_attempt(self.folder, self.name, env.job_id, attempt)
            if len(ends) == env.num_tasks:
                return
            time.sleep(0.1)


def run_to_end(
    command: Sequence[str], environ: Mapping[str, str], heard: list[int] | None = None
) -> int:
    """Exit code of a command, which ends with this process, or it would go on training beside the
    next attempt. Signals to stop are passed on to it, and noted in `heard`."""
    heard = [] if heard is None else heard
    early: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, frame: object) -> None:
        heard.append(number)
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    for stop in _STOP:
        signal.signal(stop, pass_on)
    process = subprocess.Popen(
        command, env=dict(environ), preexec_fn=Parent.here().end_program_with_me
    )
    for number in early:
        process.send_signal(number)
    code = process.wait()
    for stop in _STOP:  # what is left to do takes a moment, and is to be done
        signal.signal(stop, signal.SIG_IGN)
    return code


def _end_with_submit(controller: int) -> None:
    """Binds this process to those that have started it on this machine: submitit's controller, and
    `submit`, which waits for it."""
    Parent(controller, by_main_thread=True).end_with_me()
    if SUPERVISOR in os.environ:
        supervisor = Process.from_json(parse_json(os.environ[SUPERVISOR], SUPERVISOR))
        start_watching(supervisor.alive, lambda: os.kill(os.getpid(), signal.SIGKILL))


def outcome_code(outcome: str) -> int:
    """Exit code of a job that ended so."""
    return {"finished": 0, "stopped": 75, "failed": 2}.get(outcome, 1)


def restarts() -> int:
    """How often Slurm has requeued this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def rank_environ(env: JobEnvironment) -> dict[str, str]:
    """What a launcher sets for this process: its rank, and where rank 0 is to be met. The port
    follows from the job and its attempt, so that all processes know it without asking."""
    number = int(env.raw_job_id)
    return {
        "RANK": str(env.global_rank),
        "WORLD_SIZE": str(env.num_tasks),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.num_tasks // env.num_nodes),
        "MASTER_ADDR": address(env.hostnames[0]) if env.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(20000 + (7 * number + restarts()) % 10000),
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
    """How far a run is: stages that are finished, and the newest complete checkpoint of the one
    under way (those of finished stages may stay, and some are set aside)."""
    path = Path(output)
    finished: list[str] = []
    with contextlib.suppress(ValueError, KeyError):
        finished = read_mapping(path / "run.json", {"finished": list[Name]})["finished"]
    tags = [_TAG.fullmatch(p.parent.name) for p in path.glob("checkpoints/*/COMPLETE")]
    complete = sorted(t[0] for t in tags if t and t[1] not in finished)
    return ",".join([*finished, *complete[-1:]])


def cancelled(folder: str | Path) -> bool:
    """Whether the submission was cancelled."""
    return (Path(folder) / "cancelled").exists()


def _node(env: JobEnvironment) -> str:
    """Name of this machine."""
    return os.environ.get("SLURMD_NODENAME") or env.hostname


def _still_wanted(env: JobEnvironment) -> bool:
    """Whether a job is one to be continued: on Slurm, it runs, or only its time is up. One that
    ends otherwise was cancelled, or is being requeued by Slurm itself."""
    if env.name() != "slurm":
        return True
    text = _ask("squeue", "--noheader", "--jobs", env.job_id, "--format", "%T %r")
    state, _, reason = text.strip().partition(" ")
    return state == "RUNNING" or reason == "TimeLimit"


def _end_of_job(env: JobEnvironment) -> int | None:
    """When the time of a job is up, in seconds since 1970. From version 23 on Slurm says so in the
    environment."""
    if env.name() == "local":
        return int(time.time()) + int(os.environ["SUBMITIT_LOCAL_TIMEOUT_S"])
    with contextlib.suppress(ValueError):
        if END in os.environ:
            return int(os.environ[END])
        text = _ask("squeue", "--noheader", "--jobs", env.job_id, "--format", "%e").strip()
        return int(datetime.fromisoformat(text).timestamp())
    return None


def _ask(*command: str) -> str:
    """Output of a Slurm command, with its complaints in the job's log; asked again for some minutes
    if it fails, as a controller may be restarting. Empty if it fails to the last."""
    environ = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    for pause in (5, 10, 20, 40, 80, 0):
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return done.stdout
        time.sleep(pause)
    return ""


def main() -> int:
    """`python -m crysforge.launch.cluster.worker LOGS CODE`: in a batch script, after the step that
    exited with CODE."""
    env = JobEnvironment()
    task: Any = DelayedSubmission.load(JobPaths(sys.argv[1], env.job_id).submitted_pickle).function
    return outcome_code(task.settle(env, restarts(), int(sys.argv[2])))


if __name__ == "__main__":
    raise SystemExit(main())
