"""Where jobs run: on Slurm or in local processes through submitit, or in this process."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit import LocalExecutor, LocalJob, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from crysforge.datapipe.common.processes import Process
from crysforge.datapipe.common.threads import PROCESSES
from crysforge.launch.cluster.config import SubmitConfig, minutes, one_line
from crysforge.launch.cluster.events import EventLog, outcome_of
from crysforge.launch.cluster.worker import SUPERVISOR, Task, cancelled
from crysforge.trainer.base.signals import Requeue


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
    settle = [sys.executable, "-m", "crysforge.launch.cluster.worker", str(logs)]
    after = f"{shlex.join(settle)} $?; exit $?"
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


def script(executor: SlurmExecutor, runs: int) -> str:
    """The sbatch script that a submission of so many runs makes."""
    if runs > 1:
        executor.parameters["map_count"] = runs
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit_slurm(executor: SlurmExecutor, tasks: Sequence[Task]) -> dict[str, str]:
    """Submits one job, or an array; returns the job id of each run.

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
    return {task.name: job.job_id for task, job in zip(tasks, jobs, strict=True)}


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
    """Carries runs out in processes of this machine, `array_parallelism` at a time; calls
    `started(name, id)` for each. Returns the runs that did not finish.

    Raises:
        Requeue: SIGTERM has ended it, when those under way have saved and ended.
    """
    waiting, failed = list(tasks), []
    running: dict[int, tuple[Task, LocalJob]] = {}
    slots = range(config.array_parallelism or 1)
    at_once = min(len(slots), len(tasks)) * config.processes
    with _as_supervisor(code, folder, running, at_once):
        while waiting or running:
            for slot in slots:
                if slot not in running and waiting and not cancelled(folder):
                    task = waiting.pop(0)
                    job = _start_local(config, task, folder, slot)
                    running[slot] = task, job
                    started(task.name, job.job_id)
                    print(f"{task.name}: started, log {_log(job)}", flush=True)
            for slot, (task, job) in list(running.items()):
                if job.done() and _wants_attempt(folder, task.name, job):  # submitit gives but six
                    used = len(EventLog(folder, task.name).starts(job.job_id))
                    task = replace(task, max_requeues=task.max_requeues - used)
                    job = _start_local(config, task, folder, slot)
                    running[slot] = task, job
                    started(task.name, job.job_id)
                elif job.done():
                    del running[slot]
                    event = last_outcome(folder, task.name)
                    print(f"{task.name}: {event}", flush=True)
                    if event != "finished":
                        failed.append(task.name)
            if cancelled(folder):
                failed += [task.name for task in waiting]
                waiting = []
            time.sleep(0.2)
    return failed


@contextlib.contextmanager
def _as_supervisor(
    code: Path, folder: Path, running: Mapping[int, tuple[Task, LocalJob]], at_once: int
) -> Iterator[None]:
    """For a process that carries runs out: they use the code, share its cores between so many
    processes at once, and end with it. They end in order before it, if it is
    asked to end or fails."""

    def stop(number: int, frame: object) -> None:
        raise Requeue

    kept = {name: os.environ.get(name) for name in ("PYTHONPATH", SUPERVISOR, PROCESSES)}
    before = signal.signal(signal.SIGTERM, stop)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code), kept["PYTHONPATH"]]))
    os.environ.setdefault(PROCESSES, str(at_once))
    os.environ[SUPERVISOR] = json.dumps(Process.of(os.getpid()).to_json())
    try:
        yield
    except BaseException:
        while left := [job for _, job in running.values() if not job.done()]:
            for job in left:
                end_local(int(job.job_id), folder)
            time.sleep(1)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


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


def _wants_attempt(folder: Path, run: str, job: LocalJob) -> bool:
    """Whether the last word on a job that ended is that it is to be continued."""
    events = EventLog(folder, run).read()
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
    """Carries runs out in this process, one after the other; returns those that did not finish."""
    failed = []
    for task in tasks:
        log = EventLog(folder, task.name)
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
        if last_outcome(folder, task.name) != "finished":
            failed.append(task.name)
    return failed


def last_outcome(folder: Path, run: str) -> str:
    """How the last attempt of a run ended."""
    events: list[dict[str, Any]] = EventLog(folder, run).read()
    ends = [e["event"] for e in events if e["event"] != "requeue"]
    return "ended without a word" if not ends or ends[-1] == "start" else ends[-1]
