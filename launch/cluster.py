"""Where jobs run: on Slurm or in local processes through submitit, or in this process."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from submitit import LocalExecutor, LocalJob, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launch.events import EventLog, outcome_of
from launch.task import Task, cancelled
from models.registry import nearest

CLUSTERS = ("slurm", "local", "debug")

_OURS = {
    "array": "array_parallelism",
    "chdir": "",
    "cpus-per-task": "cpus",
    "error": "",
    "gpus-per-node": "gpus",
    "job-name": "name",
    "no-requeue": "",
    "nodes": "nodes",
    "ntasks": "nodes and tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "open-mode": "",
    "output": "",
    "requeue": "",
    **{name: name for name in ("mem", "time", "partition", "account", "constraint", "qos")},
}
"""sbatch options that have a setting of their own, or are not the user's to choose."""


@dataclass(kw_only=True)
class SubmitConfig:
    """Settings of `submit`; all others go to the job."""

    job: str = ""
    """What to run: pretrain, finetune, prepare or predict."""
    suite: str = ""
    """Instead of a job: a suite's YAML file (launch/suite.py); other settings go to it."""
    cluster: str = "slurm"
    """`slurm`; `local`: processes on this machine, waits for them; `debug`: in this process."""
    name: str = ""
    """Name of the job on the cluster; default that of its output."""
    nodes: int = 1
    """Machines per cell."""
    tasks_per_node: int | None = None
    """Processes per machine; default one for each GPU, or one."""
    gpus: int = 0
    """GPUs per machine."""
    cpus: int | None = None
    """CPUs per process; loader workers need some."""
    mem: str | None = None
    """Memory per machine, as sbatch takes it: 64G."""
    time: str | None = None
    """Time limit of one turn, as sbatch takes it: 90 (minutes), 12:00:00, 2-00. At its end the
    job saves, is queued again and continues."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    constraint: str | None = None
    """Slurm constraint: features the nodes must have."""
    qos: str | None = None
    """Slurm quality of service."""
    slurm: dict[str, str] = field(default_factory=dict)
    """Any other sbatch option: `slurm.reservation=NAME`, `slurm.exclusive=true`."""
    sweep: str = ""
    """Grid `[target=[a,b],seed=[0,1]]`, or YAML file with a grid or a list of cells."""
    array_parallelism: int | None = None
    """Cells that run at a time; default all on Slurm, one on this machine."""
    max_requeues: int = 1000
    """Turns a cell may be given after its first."""
    max_crashes: int = 3
    """Crashes in a row without progress after which a cell is given another turn."""
    dry_run: bool = False
    """Show what would be submitted (the sbatch script), and stop."""
    status: str = ""
    """Instead of a job: show the state of the submission of this output, or of runs."""
    collect: str = ""
    """Instead of a job: gather the metrics.json of all its cells into one CSV."""
    cancel: str = ""
    """Instead of a job: end all its cells that run or wait."""

    def __post_init__(self) -> None:
        if self.cluster not in CLUSTERS:
            raise ValueError(f"unknown cluster {self.cluster!r}: {nearest(self.cluster, CLUSTERS)}")
        if self.tasks_per_node is None:
            self.tasks_per_node = max(1, self.gpus)
        for key in ("nodes", "tasks_per_node", "cpus", "array_parallelism"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        for key in ("gpus", "max_requeues", "max_crashes"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if self.gpus and self.tasks_per_node != self.gpus:
            raise ValueError(
                f"gpus={self.gpus} and tasks_per_node={self.tasks_per_node}: every process takes "
                "one GPU, so leave tasks_per_node out"
            )
        if self.cluster != "slurm" and self.nodes > 1:
            raise ValueError(f"cluster={self.cluster} has one node, not {self.nodes}")
        if self.cluster == "debug" and self.processes > 1:
            raise ValueError(f"cluster=debug has one process, not {self.processes}")
        if self.time is not None:
            minutes(self.time)
        for key, value in self.slurm.items():
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                raise ValueError(f"slurm.{key}: not an sbatch option; write it without the dashes")
            if key in _OURS:
                hint = f"use {_OURS[key]}" if _OURS[key] else "submit sets it itself"
                raise ValueError(f"slurm.{key} cannot be given: {hint}")
            one_line(f"slurm.{key}", value)
        for key in ("name", "mem", "partition", "account", "constraint", "qos"):
            one_line(key, getattr(self, key) or "")

    @property
    def processes(self) -> int:
        """Processes of one cell."""
        assert self.tasks_per_node is not None
        return self.nodes * self.tasks_per_node


def one_line(name: str, value: str) -> None:
    """Raises ValueError for a value that would not stay on its line of a script."""
    if not value.isprintable():
        raise ValueError(f"{name}={value!r} has characters that cannot be printed")


def minutes(text: str) -> int:
    """A time limit in sbatch's notation, in minutes, rounded up: `90`, `90:30`, `12:00:00`, `2-00`,
    `2-00:30`, `2-00:30:00`.

    Raises:
        ValueError: any other text, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError(f"time={text!r} is not a time limit such as 90, 12:00:00 or 2-00:00:00")
    days, *rest = match.groups()
    parts = [int(p) for p in rest if p is not None]
    if days is not None:
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, (mins, seconds) = 0, [*parts, 0][:2]
    total = -(-(((int(days or 0) * 24 + hours) * 60 + mins) * 60 + seconds) // 60)
    if total < 1:
        raise ValueError(f"time={text!r} is no time at all")
    return total


class _Slurm(SlurmExecutor):
    """submitit's executor, which here can also show a script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def slurm_executor(config: SubmitConfig, name: str, folder: Path, code: Path) -> SlurmExecutor:
    """The executor for a submission: one task per process, requeued after time-out, preemption and
    node failure."""
    path = str(code)
    for what in (str(folder), path, sys.executable):
        one_line("path", what)
        if "%" in what:
            raise ValueError(f"{what}: Slurm takes % in a path for a pattern; choose another path")
    logs = folder / "logs"
    executor = _Slurm(logs, max_num_timeout=config.max_requeues)
    options = {k: True if v == "true" else v for k, v in config.slurm.items()}
    # A process that ends gives the others half a minute: to note why they end, or to finish.
    srun = ["--kill-on-bad-exit=0", "--wait=30"]
    if config.cpus:
        srun.append(f"--cpus-per-task={config.cpus}")  # since 22.05 sbatch's does not reach srun
    after = f"{shlex.join([sys.executable, '-m', 'launch.task', str(logs)])} $?; exit $?"
    executor.update_parameters(
        job_name=config.name or name,
        nodes=config.nodes,
        ntasks_per_node=config.tasks_per_node,
        cpus_per_task=config.cpus,
        gpus_per_node=config.gpus or None,
        mem=config.mem,
        time=minutes(config.time) if config.time else None,
        partition=config.partition,
        account=config.account,
        constraint=config.constraint,
        qos=config.qos,
        wckey=None,
        stderr_to_stdout=True,
        setup=[
            f"export PYTHONPATH={shlex.quote(path)}${{PYTHONPATH:+:$PYTHONPATH}}",
            "trap : TERM  # at a time limit, see srun to its end",
            f"trap {shlex.quote(after)} EXIT",
        ],
        srun_args=srun,
        additional_parameters={"requeue": True, **options},
        **({"array_parallelism": config.array_parallelism} if config.array_parallelism else {}),
    )
    return executor


def script(executor: SlurmExecutor, cells: int) -> str:
    """The sbatch script that a submission of so many cells makes."""
    if cells > 1:
        executor.parameters["map_count"] = cells
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit_slurm(executor: SlurmExecutor, tasks: Sequence[Task]) -> dict[str, str]:
    """Submits one job, or an array; returns the job id of each cell.

    Raises:
        ValueError: sbatch is missing or refused, with its words.
    """
    try:
        with _outside_of_jobs():
            jobs = executor.submit_array(list(tasks))
    except FileNotFoundError:
        raise ValueError(
            "sbatch is not on PATH: submit from a login node, or cluster=local"
        ) from None
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        lines = [x.strip() for x in str(error).splitlines() if "error:" in x]
        raise ValueError(f"sbatch refused: {' '.join(lines) or error}") from None
    return {task.cell: job.job_id for task, job in zip(tasks, jobs, strict=True)}


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hides what a job's environment says about that job, so that a job can submit others."""
    kept = dict(os.environ)
    if "SLURM_JOB_ID" in kept:
        for key in kept:
            if key.startswith(("SLURM_", "SLURMD_", "SRUN_", "SBATCH_")) and key != "SLURM_CONF":
                del os.environ[key]
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(key, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def run_local(
    config: SubmitConfig,
    tasks: Sequence[Task],
    folder: Path,
    code: Path,
    started: Callable[[str, str], None],
) -> list[str]:
    """Runs cells in processes of this machine, `array_parallelism` at a time, to the last; calls
    `started(cell, id)` for each. Returns the cells that did not finish."""
    waiting, failed = list(tasks), []
    running: dict[int, tuple[Task, LocalJob]] = {}
    slots = range(config.array_parallelism or 1)
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{code}{os.pathsep}{path}" if path else str(code)
    try:
        while waiting or running:
            for slot in slots:
                if slot not in running and waiting and not cancelled(folder):
                    task = waiting.pop(0)
                    job = _start_local(config, task, folder, slot)
                    running[slot] = task, job
                    started(task.cell, job.job_id)
                    print(f"{task.cell}: started, log {_log(job)}", flush=True)
            for slot, (task, job) in list(running.items()):
                if job.done() and _wants_turn(folder, task.cell, job):  # submitit gives but six
                    used = len(EventLog(folder, task.cell).starts(job.job_id))
                    task = replace(task, max_requeues=task.max_requeues - used)
                    job = _start_local(config, task, folder, slot)
                    running[slot] = task, job
                    started(task.cell, job.job_id)
                elif job.done():
                    del running[slot]
                    event = last_outcome(folder, task.cell)
                    print(f"{task.cell}: {event}", flush=True)
                    if event != "finished":
                        failed.append(task.cell)
            if cancelled(folder):
                failed += [task.cell for task in waiting]
                waiting = []
            time.sleep(0.2)
    except BaseException:
        for _, job in running.values():
            end_local(int(job.job_id), folder)
        raise
    finally:
        os.environ["PYTHONPATH"] = path
    return failed


def _start_local(config: SubmitConfig, task: Task, folder: Path, slot: int) -> LocalJob:
    executor = LocalExecutor(folder / "logs", max_num_timeout=config.max_requeues)
    first = slot * config.gpus
    limit = minutes(config.time) if config.time else 60 * 24 * 365
    executor.update_parameters(
        nodes=1,
        tasks_per_node=config.tasks_per_node,
        gpus_per_node=config.gpus,
        visible_gpus=tuple(range(first, first + config.gpus)),
        timeout_min=limit,
        signal_delay_s=min(90, 30 * limit),
        stderr_to_stdout=True,
    )
    job = executor.submit(task)
    assert isinstance(job, LocalJob)
    return job


def _wants_turn(folder: Path, cell: str, job: LocalJob) -> bool:
    """Whether the last word on a job that ended is that it is to be continued."""
    events = EventLog(folder, cell).read()
    return bool(events) and events[-1]["event"] == "requeue" and events[-1]["job"] == job.job_id


def _log(job: LocalJob) -> Path:
    return job.task(0).paths.stdout


def end_local(pid: int, folder: Path) -> bool:
    """Asks a local job's controller to end it; whether there was one. A process that has the
    number by now and is another one is left alone."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"submitit.local._local" not in command or str(folder / "logs").encode() not in command:
            return False
        os.kill(pid, signal.SIGTERM)
    except OSError:
        return False
    return True


def run_here(tasks: Sequence[Task], folder: Path) -> list[str]:
    """Runs cells in this process, one after the other; returns those that did not finish."""
    failed = []
    for task in tasks:
        log = EventLog(folder, task.cell)
        log.note("start", job="debug", node=os.uname().nodename, progress="")
        argv, sys.argv = sys.argv, list(task.argv)
        try:
            runpy.run_path(task.argv[0], run_name="__main__")
            log.note("finished", job="debug", code=0)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            log.note(outcome_of(code), job="debug", code=code)
        except Exception:
            traceback.print_exc()
            log.note("crashed", job="debug", code=1)
        finally:
            sys.argv = argv
        if last_outcome(folder, task.cell) != "finished":
            failed.append(task.cell)
    return failed


def last_outcome(folder: Path, cell: str) -> str:
    """How the last turn of a cell ended."""
    events: list[dict[str, Any]] = EventLog(folder, cell).read()
    ends = [e["event"] for e in events if e["event"] != "requeue"]
    return "ended without a word" if not ends or ends[-1] == "start" else ends[-1]
