"""Who am I among the processes of this job: one answer for every launcher."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from crysforge.trainer.base import script
from crysforge.trainer.base.agreement import agree
from crysforge.trainer.base.rendezvous import (
    GRACE_S,
    LostRank,
    RankCrashed,
    RankFailed,
    Rendezvous,
    join,
)
from crysforge.trainer.base.store import first_line

_meeting: Rendezvous | None = None
_alone = False
"""Whether this process found no way to the others."""


@dataclass(frozen=True)
class World:
    """This process's place in the job and the device it works on."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    meeting: Rendezvous | None = field(default=None, compare=False, repr=False)
    """Where the ranks of a job compare what they do; None for one that is alone."""

    @property
    def main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """What a GPU calls itself; empty for a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""

    def describe(self) -> str:
        """`rank 0/2 on host, cuda:0 (NVIDIA L40)`, for the log."""
        name = f" ({self.device_name})" if self.device_name else ""
        return f"rank {self.rank}/{self.size} on {socket.gethostname()}, {self.device}{name}"

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()

    def share(self, value: Any = None) -> Any:
        """Rank 0's value (JSON), on every rank, without the device."""
        return value if self.meeting is None else self.meeting.share(value)

    def broadcast(self, value: float) -> float:
        """Rank 0's number, on every rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor([float(value)], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return float(tensor.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        tensor = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())


def place(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) from a launcher's environment variables.

    The deepspeed launcher and torchrun set RANK, WORLD_SIZE and LOCAL_RANK; srun sets SLURM_PROCID,
    SLURM_NTASKS and SLURM_LOCALID; without any of them the process is alone. A Slurm batch or
    interactive shell with several tasks is not a launched task and counts as alone.

    Raises:
        ValueError: a variable is no number, or no rank of so many.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    elif "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        names = "SLURM_PROCID", tasks, "SLURM_LOCALID"
    else:
        return 0, 1, 0
    for name in names:
        if not environ.get(name, "0").isdecimal():
            raise ValueError(f"{name}={environ[name]} is no number: launchers set one per process")
    rank, size, local = (int(environ.get(n, d)) for n, d in zip(names, (0, 1, 0), strict=True))
    if rank >= size:
        raise ValueError(f"{names[0]}={rank}, but {names[1]}={size}: ranks go from 0 to {size - 1}")
    return rank, size, local


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name: cpu, cuda, cuda:1.

    Raises:
        ValueError: no such name, or this machine has no such GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: use cpu, cuda or cuda:1")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device={name}, but this machine shows {count} GPU(s): give device=cpu")
    return device


def init(timeout_s: float = 1800, facts: Mapping[str, Any] | None = None) -> World:
    """Meets the other ranks of the job, makes sure that all are about to do the same, joins them in
    a process group (NCCL on GPUs, gloo on CPUs) and claims this rank's device.

    Args:
        timeout_s: longest wait for another rank.
        facts: what all must have alike, see `trainer.base.agreement`.

    Raises:
        ValueError: the launcher's variables are wrong, the ranks disagree, more local ranks than
            GPUs, or another rank has failed.
        ConnectionError, TimeoutError: there is no way to another rank.
    """
    global _meeting, _alone
    rank, size, local_rank = place(os.environ)
    if size > 1 and _meeting is None and not dist.is_initialized():
        _alone = True  # until they meet
        _meeting = join(rank, size, timeout_s)
        _alone = False
    device = _claim_device(local_rank)
    world = World(rank, size, local_rank, device, _meeting)
    if _meeting is not None and not dist.is_initialized():
        agree(_meeting, {"device": device.type, **(facts or {})})
        os.environ.setdefault("RANK", str(rank))
        os.environ.setdefault("WORLD_SIZE", str(size))
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        _connect(_meeting, device, timedelta(seconds=timeout_s))
    return world


def _claim_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = local_rank if count > 1 else 0  # Slurm may show each task its own GPU only
    if index >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this node shows {count}; "
            "start one process per GPU"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _connect(meeting: Rendezvous, device: torch.device, timeout: timedelta) -> None:
    """Builds the process group, and begins to look after failures of other ranks."""
    meeting.watch()
    gpu = device.type == "cuda"
    # Groups that others make, as DeepSpeed does, know no timeout but these.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    try:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", meeting.store),
            rank=meeting.rank,
            world_size=meeting.size,
            timeout=timeout,
            device_id=device if gpu else None,
        )
    except RuntimeError as error:
        name = "NCCL_SOCKET_IFNAME" if gpu else "GLOO_SOCKET_IFNAME"
        raise meeting.news() or ConnectionError(
            f"{meeting.name} cannot connect to all other ranks: one has ended, or {name} must name "
            f"the network interface that joins all hosts ({first_line(error)})"
        ) from error


def shutdown() -> None:
    """Leaves the process group and the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
    ended(None, 0)


def ended(error: Exception | None, code: int) -> None:
    """Lets the other ranks know how this one ends: they end with the same reason. For
    `trainer.base.script.run`; also where this one has not met them yet.

    Args:
        error: what ends it; None if nothing is wrong.
        code: exit code.
    """
    global _meeting, _alone
    if error is not None and _meeting is None and not _alone:
        _alone = True
        with suppress(ValueError, OSError):
            rank, size, _ = place(os.environ)
            if size > 1:
                _meeting = join(rank, size, GRACE_S)
    meeting, _meeting = _meeting, None
    if meeting is None:
        return
    _alone = True
    if error is None:
        meeting.leave(wait=meeting.hosts)
    elif isinstance(error, RankFailed | RankCrashed):
        meeting.leave(wait=True)
    elif isinstance(error, LostRank):
        meeting.close()
    else:
        known = isinstance(error, ValueError | OSError)
        what = str(error) if known else f"crashed, {type(error).__name__}: {first_line(error)}"
        meeting.tell(what, code)


def lost_process(error: Exception, rank: int) -> Exception | None:
    """What to tell a user where an error means that another process of the job is gone."""
    text = str(error)
    known = any(word in text for word in ("gloo", "NCCL", "Connection closed"))
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and known):
        news = None if _meeting is None else _meeting.news()
        return news or LostRank(rank, first_line(error))
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return ChildProcessError(
            f"rank {rank} lost a loader worker, perhaps to a lack of memory (lower loader.workers "
            f"or loader.prefetch then); the same command continues from the newest checkpoint "
            f"({first_line(error)})"
        )
    return None


script.EXPLANATIONS.append(lambda error: lost_process(error, place(os.environ)[0]))
