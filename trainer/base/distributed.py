"""Who am I among the processes of this job: one answer for every launcher."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process's place in the job and the device it works on."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

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
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return (
            int(environ["RANK"]),
            int(environ["WORLD_SIZE"]),
            int(environ.get("LOCAL_RANK", 0)),
        )
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        return (
            int(environ["SLURM_PROCID"]),
            int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", 1))),
            int(environ.get("SLURM_LOCALID", 0)),
        )
    return 0, 1, 0


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
        raise ValueError(f"device={name} is none to run on: give cpu, cuda or cuda:1")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device={name}, but this machine shows {count} GPU(s): give device=cpu")
    return device


def init(timeout_s: float = 1800) -> World:
    """Joins the job's process group (NCCL on GPUs, gloo on CPUs) and claims this rank's device.

    Raises:
        ValueError: more local ranks than GPUs, or a launcher that left out the master's address.
    """
    rank, size, local_rank = place(os.environ)
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        index = local_rank if count > 1 else 0  # Slurm may show each task its own GPU only
        if index >= count:
            raise ValueError(
                f"local rank {local_rank} has no GPU: this node shows {count}; "
                "start one process per GPU"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    world = World(rank, size, local_rank, device)
    if size > 1 and not dist.is_initialized():
        os.environ.setdefault("RANK", str(rank))
        os.environ.setdefault("WORLD_SIZE", str(size))
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            raise ValueError(
                "several processes but no MASTER_ADDR and MASTER_PORT: start with the deepspeed "
                "launcher, torchrun, or launch/submit.py"
            )
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    return world


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_process(error: Exception, rank: int) -> OSError | None:
    """What to tell a user where an error means that another process of the job is gone."""
    text = str(error)
    reason = text.splitlines()[0][:200] if text else ""
    known = any(word in text for word in ("gloo", "NCCL", "Connection closed"))
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and known):
        return ConnectionError(
            f"rank {rank} lost the other ranks, whose output may tell why; the same command "
            f"continues from the newest checkpoint ({reason})"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return ChildProcessError(
            f"rank {rank} lost a loader worker, perhaps to a lack of memory (lower loader.workers "
            f"or loader.prefetch then); the same command continues from the newest checkpoint "
            f"({reason})"
        )
    return None
