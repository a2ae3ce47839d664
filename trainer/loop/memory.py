"""How much memory a training step takes, known before anything is allocated.

Weights, gradients and optimiser state are counted from the parameters and the ZeRO stage.
Activations are counted by running the step on tensors without values, which have shapes and types
only: no arithmetic, no memory, and right for any encoder and stage. The step is run in the form it
has on a GPU without the Triton kernels, which need less.
"""

from __future__ import annotations

import copy
import os
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crysforge.datapipe.schema import CrystalBatch
from crysforge.trainer.base.distributed import World
from crysforge.trainer.engines.base import BUCKET, PRECISIONS, EngineConfig, set_recompute
from crysforge.trainer.engines.build import uses_deepspeed
from crysforge.trainer.loop.averages import total_over_ranks, weighted_loss
from crysforge.trainer.stages.base import Stage

WHOLE = 5 * 10**8
"""Most elements that DeepSpeed joins for one reduction without ZeRO."""
GPU = torch.device("cuda")
INDEX_BYTES = 200
"""Per edge: the sums over edges, forward and transposed, as 64-bit indices."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one rank takes at the peak of a training step."""

    weights: float
    gradients: float
    optimizer: float
    """Adam's moments, and the master copy that ZeRO keeps."""
    buffers: float
    """DeepSpeed's buffers for communication."""
    activations: float
    """Most that lives at once in forward and backward beside all of the above."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "buffers", "activations")
        shown = ", ".join(f"{p} {getattr(self, p) / 1e9:.2f}" for p in parts if getattr(self, p))
        return f"{self.total / 1e9:.2f} GB ({shown})"


def state_bytes(parameters: int, config: EngineConfig, ranks: int, deepspeed: bool) -> MemoryPlan:
    """A plan without activations: fp32 weights, gradients, two moments; shards under ZeRO.

    Args:
        parameters: their number.
        deepspeed: whether DeepSpeed runs the step; ZeRO stages mean nothing without.
    """
    each = 4.0 * parameters
    if not deepspeed or config.zero_stage == 0:
        buffers = min(each, 4.0 * WHOLE) if deepspeed else 0.0
        return MemoryPlan(each, each, 2 * each, buffers, 0.0)
    shard = each / ranks
    weights = shard if config.zero_stage == 3 else each
    gradients = shard if config.zero_stage >= 2 else each
    # Two buckets, so that one fills while the other is reduced.
    return MemoryPlan(weights, gradients, 3 * shard, 2 * min(each, 4.0 * BUCKET), 0.0)


def plan_memory(
    stage: Stage,
    batch: CrystalBatch,
    config: EngineConfig,
    ranks: int,
    deepspeed: bool,
    device: torch.device = GPU,
) -> MemoryPlan:
    """What a training step of a batch (of one rank, one micro-batch) takes."""
    parameters = sum(p.numel() for p in stage.parameters())
    state = state_bytes(parameters, config, ranks, deepspeed)
    activations = activation_bytes(stage, batch, config, device) + INDEX_BYTES * batch.num_edges
    return MemoryPlan(**{**vars(state), "activations": float(activations)})


def activation_bytes(
    stage: Stage, batch: CrystalBatch, config: EngineConfig, device: torch.device = GPU
) -> int:
    """Peak bytes of what forward and backward of a batch make, beside one gradient for each
    parameter. The stage is left as it is."""
    dtype = PRECISIONS[config.precision]
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        shadow, fake = copy.deepcopy(stage), copy.deepcopy(batch)
    with mode:
        shadow.train()
        set_recompute(shadow, config.recompute, device)
        for parameter in shadow.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        # fp16 on CPUs knows fewer operations, and has the size of bf16
        half = torch.bfloat16 if dtype is not None else None
        with _Peak() as peak:
            with torch.autocast("cpu", half, enabled=half is not None):
                terms = shadow(fake)
            sums = total_over_ranks(terms, (), World())
            weighted_loss(terms, sums, shadow.weights, World())[0].backward()
            return peak.most


class _Peak(TorchDispatchMode):
    """Counts the bytes of live tensors that operations make, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in before and id(storage) not in self._known:
                self._known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.most = max(self.most, self.live)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(values) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor)]


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_text(stage: Stage, batch: CrystalBatch, config: EngineConfig, world: World) -> str:
    """One line for `--dry-run`: what the largest batch takes, beside the device's memory."""
    device = world.device
    plan = plan_memory(stage, batch, config, world.size, uses_deepspeed(config, world), device)
    has = device_bytes(device)
    verdict = "" if plan.total < has else "; that is TOO MUCH: lower loader.max_atoms or batch_size"
    return (
        f"{stage.name}: memory per rank, at the largest batch ({batch.num_crystals} crystals, "
        f"{batch.num_atoms} atoms, {batch.num_edges} edges): {plan}, "
        f"of {has / 1e9:.3g} GB on {device}{verdict}"
    )
