"""Settings of `submit`: what a job asks of its cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from crysforge.datapipe.common.names import nearest

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
    """Instead of a job: a suite's YAML file (docs/evaluation.md); other settings go to it."""
    cluster: str = "slurm"
    """`slurm`; `local`: processes on this machine, waits for them; `debug`: in this process."""
    name: str = ""
    """Name of the job on the cluster; default that of its output."""
    nodes: int = 1
    """Machines per run."""
    tasks_per_node: int | None = None
    """Processes per machine; default one for each GPU, or one."""
    gpus: int = 0
    """GPUs per machine."""
    cpus: int | None = None
    """CPUs per process; loader workers need some."""
    mem: str | None = None
    """Memory per machine, as sbatch takes it: 64G."""
    time: str | None = None
    """Time limit of one attempt, as sbatch takes it: 90 (minutes), 12:00:00, 2-00. At its end the
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
    """Grid `[target=[a,b],seed=[0,1]]`, or YAML file with a grid or a list of runs."""
    array_parallelism: int | None = None
    """Most runs at a time; default all on Slurm, one on this machine."""
    max_requeues: int = 1000
    """Attempts a run may be given after its first."""
    max_crashes: int = 3
    """Crashes in a row without progress after which a run is given another attempt."""
    dry_run: bool = False
    """Show what would be submitted (the sbatch script), and stop."""
    status: str = ""
    """Instead of a job: show the state of the submission of this output, or of runs."""
    collect: str = ""
    """Instead of a job: gather the metrics.json of all its runs into one CSV."""
    cancel: str = ""
    """Instead of a job: end all its jobs that run or wait."""

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
        """Processes of one run."""
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
        ValueError: any other text, or a time that is not positive.
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
        raise ValueError(f"time must be positive, got {text!r}")
    return total
