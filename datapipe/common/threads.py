"""How many threads a process computes with and how they wait, settled before torch is loaded.

The OpenMP runtime reads its settings when torch is loaded. Left alone it takes every core that it
sees, in every process of a job, and threads that wait for each other spin: beside other work a step
then takes ten times as long and more. So a launch script calls `choose` before it imports torch.
What the user has set is left as it is. Nothing is done in a session that imports this package.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COUNT, WAITING = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
COUNTS = (COUNT, "MKL_NUM_THREADS")
"""Variables by which a user gives the number of threads."""
WAITINGS = (WAITING, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user says how threads wait."""
PASSIVE = "PASSIVE"
"""Threads that wait sleep: GNU's runtime, which torch's wheels bring, and LLVM's both heed it."""
CHOSEN = "CRYSFORGE_THREADS"
"""Holds what `choose` set, so that a process started from here takes it for no user's setting."""
PROCESSES = "CRYSFORGE_PROCESSES"
"""Processes that share this machine's cores, where more than a launcher's ranks do."""
SLURM_TASKS = "SLURM_STEP_TASKS_PER_NODE"


@dataclass(frozen=True)
class Share:
    """The cores of one process."""

    cpus: int
    """Logical CPUs."""
    threads: int
    """Physical cores among them: a second thread on one adds little to arithmetic."""
    processes: int
    """Processes of the job on this machine."""
    total: int
    """Logical CPUs of all of them together."""


@dataclass(frozen=True)
class Choice:
    """How this process computes, and who said so."""

    share: Share
    threads: int = 0
    """Threads of torch; 0 if not chosen here."""
    workers: int = 0
    """Cores left to loader workers."""
    count_by: str = ""
    """Where the number comes from if it was not chosen here."""
    waiting_by: str = ""
    """The same for how threads wait."""

    def __str__(self) -> str:
        share = self.share
        if not self.threads:
            return f"threads: {self.count_by}; waiting: {self.waiting_by or 'passive'}"
        why = f"{share.total} CPU{'s' if share.total > 1 else ''}"
        if share.processes > 1:
            why += f", {share.processes} processes"
        if self.workers:
            why += f", {self.workers} left to loader workers"
        return f"threads: {self.threads} ({why}); waiting: {self.waiting_by or 'passive'}"


_choice: Choice | None = None


def choose(most: int | None = None) -> None:
    """Chooses threads for this process, in its environment; to be called before anything imports
    torch. Where that has happened already, whoever did it has chosen.

    Args:
        most: threads, where further ones would have nothing to do.
    """
    global _choice
    if _choice is not None:
        return
    share = share_of(os.environ)
    if "torch" in sys.modules:
        _choice = Choice(share, count_by="as torch had them", waiting_by="as torch had it")
        return
    environ = users(os.environ)
    _choice = plan(environ, share, most)
    ours = {COUNT: str(_choice.threads)} if _choice.threads else {}
    ours |= {} if _choice.waiting_by else {WAITING: PASSIVE}
    for name in {COUNT, WAITING} & (os.environ.keys() - environ.keys()):
        del os.environ[name]
    os.environ.update(ours)
    os.environ[CHOSEN] = " ".join(f"{name}={value}" for name, value in ours.items())


def plan(environ: Mapping[str, str], share: Share, most: int | None = None) -> Choice:
    """What `choose` does in an environment that holds only what a user has set."""
    count_by = next((f"{n}={environ[n]}" for n in COUNTS if environ.get(n)), "")
    waiting_by = next((f"{n}={environ[n]}" for n in WAITINGS if environ.get(n)), "")
    threads = 0 if count_by else min(share.threads, most or share.threads)
    return Choice(share, threads, 0, count_by, waiting_by)


def leave_cores(workers: int) -> None:
    """Leaves cores to so many loader workers, a quarter of this process's at most: beside models
    that many cores compute, a worker has little to do."""
    global _choice
    if _choice is None or not _choice.threads:
        return
    left = min(workers, _choice.share.threads // 4)
    threads = _choice.share.threads - left
    _choice = Choice(_choice.share, threads, left, waiting_by=_choice.waiting_by)
    _use(threads)


def single() -> None:
    """One thread, for a process that is one of several at the same work."""
    _use(1)


def _use(count: int) -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)


def describe() -> str:
    """One line on what was chosen, for the log."""
    return str(_choice or Choice(share_of(os.environ), 0, 0, "torch's own", "torch's own"))


def users(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what `choose` set in a process before this one, and without the one
    thread that torchrun sets where the user gives no number."""
    found = dict(environ)
    for setting in environ.get(CHOSEN, "").split():
        name, _, value = setting.partition("=")
        if found.get(name) == value:
            del found[name]
    if "TORCHELASTIC_RUN_ID" in found and found.get(COUNT) == "1":
        try:  # what torchrun itself was started with
            started = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        except OSError:
            return found
        if not any(line.startswith(COUNT.encode() + b"=") for line in started):
            del found[COUNT]
    return found


def share_of(environ: Mapping[str, str], root: Path = Path("/")) -> Share:
    """The cores of this process: those it may run on, within the quota of its control group, by the
    number of the job's processes on this machine.

    Args:
        root: where `proc` and `sys` are.
    """
    own = _affinity(0)
    processes = _processes(environ)
    # Where a launcher binds each process to cores of its own, its own affinity is wider.
    total = max(len(own), len(_affinity(os.getppid())) if processes > 1 else 0)
    if "SLURM_STEP_ID" in environ:
        total = _number(environ, "SLURM_CPUS_ON_NODE") or total
    if (limit := quota(root)) is not None:
        total = min(total, max(1, int(limit)))
    cpus = max(1, min(len(own), total // processes))
    return Share(cpus, max(1, cpus * _cores(own, root) // len(own)), processes, total)


def _affinity(process: int) -> set[int]:
    """Logical CPUs that a process may run on."""
    try:
        return os.sched_getaffinity(process)
    except (AttributeError, OSError):  # not Linux, or the process is gone
        return set(range(os.cpu_count() or 1))


def _processes(environ: Mapping[str, str]) -> int:
    """Processes that share this machine's cores, by what their launcher says."""
    if number := _number(environ, PROCESSES):
        return number
    if "RANK" in environ and "WORLD_SIZE" in environ:
        # torchrun and submit; the deepspeed launcher; Open MPI; MPICH and Intel MPI
        names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
        for name in names:
            if number := _number(environ, name):
                return number
        if environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost", "::1"):
            return _number(environ, "WORLD_SIZE") or 1
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        tasks: list[int] = []  # of each node, from `4(x2),3`
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get(SLURM_TASKS, "")):
            tasks += [int(count)] * int(times or 1)
        node = _number(environ, "SLURM_NODEID") or 0
        return tasks[node] if node < len(tasks) else 1
    return 1


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) or None if text.isdecimal() else None


def quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the control groups of this process allow; None: no limit."""
    found: list[float] = []
    groups, base = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    for line in _text(groups).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = base / controllers if (base / controllers).is_dir() else base / "cpu"
        at = (top if controllers else base) / path.lstrip("/")
        # In a container the path may be the host's: then only the topmost group is there.
        for group in (at, *at.parents):
            if controllers:
                limit = _text(group / "cpu.cfs_quota_us").split()
                limit += _text(group / "cpu.cfs_period_us").split()
            else:
                limit = _text(group / "cpu.max").split()
            if len(limit) == 2 and limit[0] != "max" and int(limit[0]) > 0:
                found.append(int(limit[0]) / int(limit[1]))
            if group == base:
                break
    return min(found, default=None)


def _cores(cpus: set[int], root: Path) -> int:
    """Physical cores among logical CPUs."""
    base = root / "sys/devices/system/cpu"
    siblings = {_text(base / f"cpu{n}/topology/thread_siblings_list") or str(n) for n in cpus}
    return len(siblings)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
