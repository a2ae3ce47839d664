"""What an engine is: settings, interface, and what both kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.ops.recompute import RECOMPUTE
from crysforge.trainer.base.distributed import World
from crysforge.trainer.stages.base import Stage, Term

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BUCKET = 39063 * 512
"""Elements whose gradients ZeRO reduces together: about 2·10⁷, 80 MB in fp32. Reduction begins when
a bucket is full, so that of a bucket as large as the model begins when backward has ended."""


@dataclass(kw_only=True)
class EngineConfig:
    """How a stage is run on the hardware; changes nothing about what is learned."""

    engine: str = "auto"
    """`torch` (one device), `deepspeed`, or `auto`: DeepSpeed when a launcher started the job."""
    precision: str = "fp32"
    """Matrix products in fp32, bf16 or fp16 (fp16 with loss scaling, on GPUs)."""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 0 nothing, 1 optimiser state, 2 also gradients, 3 also weights sharded."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    recompute: str = "auto"
    """What the denoiser makes again in the backward pass instead of keeping it: `none`; `cheap`,
    what no matrix product made, and attention; `blocks`, all but each block's input, for a third
    more arithmetic; `auto`: cheap on GPUs, none on CPUs. Equal results."""
    timeout_s: float = 1800
    """Longest wait for another rank, in seconds."""
    deterministic: bool = False
    """Only deterministic kernels; slower on GPUs."""

    def __post_init__(self) -> None:
        if self.engine not in ("auto", "torch", "deepspeed"):
            raise ValueError(f"engine must be auto, torch or deepspeed, got {self.engine!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be fp32, bf16 or fp16, got {self.precision!r}")
        if self.recompute not in ("auto", *RECOMPUTE):
            kinds = ", ".join(RECOMPUTE)
            raise ValueError(f"recompute must be auto, {kinds}, got {self.recompute!r}")
        if not 0 < self.timeout_s <= 1e9:
            raise ValueError(f"timeout_s must be above 0 and at most 1e9, got {self.timeout_s}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, got {self.accumulation}")


class Engine(ABC):
    """One stage on this rank's device."""

    stage: Stage
    world: World
    grad_norm: Tensor | float = 0.0
    """Gradient norm of the last step, before clipping."""
    skipped: Tensor | bool = False
    """Whether the last step skipped its update because the gradient was non-finite, the same on
    all ranks. A tensor may still be on its way: reading it waits for the device."""

    @abstractmethod
    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        """The stage's terms under the engine's precision."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's loss (a mean over micro-batches is formed)."""

    @abstractmethod
    def step(self, lr: float, beta1: float) -> None:
        """Clips and updates once `accumulation` micro-batches are in; leaves weights and moments
        as they are if the gradient is not finite."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Full fp32 state of the module on the CPU. Collective; empty on ranks other than 0."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Full Adam state, `exp_avg/<name>`, `exp_avg_sq/<name>` and `step`. Collective; empty on
        ranks other than 0."""

    @abstractmethod
    def load_optimizer(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `optimizer_state` gave. Every rank passes the same full state."""


def schedule(groups: Iterable[dict], lr: float, beta1: float) -> None:
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        group["betas"] = (beta1, group["betas"][1])


def set_recompute(stage: nn.Module, recompute: str, device: torch.device) -> None:
    """Tells the stage's modules that can recompute what to, `auto` by the device."""
    if recompute == "auto":
        recompute = "none" if device.type == "cpu" else "cheap"
    for module in stage.modules():
        if hasattr(module, "recompute"):
            module.recompute = recompute  # type: ignore[assignment]
