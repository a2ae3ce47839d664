"""What a stage is: a module that turns a packed batch into named sums and counts.

The loop is one and knows no stage. It asks for the terms of a batch, divides each sum by the
count over all ranks, adds up those that `weights` names, and steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from crysforge.datapipe.graphs.transforms import Transform
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.base import Encoder
from crysforge.models.registry import Registry


@dataclass
class Term:
    """A quantity to be averaged over the global batch: both are scalar fp32 tensors."""

    total: Tensor
    """Sum over this rank's part (with gradient where it enters the loss)."""
    count: Tensor
    """What to divide by, summed over ranks first."""


@dataclass(kw_only=True)
class StageConfig:
    """Settings every stage has: how long and how fast it learns."""

    epochs: float = 50
    """Passes over the training split."""
    max_steps: int | None = None
    """Ends the stage (and its learning-rate cycle) after so many steps, whatever `epochs` says."""
    batch_size: int = 256
    """Crystals per optimiser step, over all ranks."""
    lr: float = 1e-3
    """Largest learning rate of the one-cycle schedule."""
    weight_decay: float = 1e-5
    """AdamW decay; biases and norm parameters have none."""
    pct_start: float = 0.3
    """Fraction of the steps in which the learning rate rises."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_steps", 1), ("weight_decay", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("epochs", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.lr <= 10:
            raise ValueError(f"lr must be above 0 and at most 10, got {self.lr}")
        if self.weight_decay > 100:
            raise ValueError(f"weight_decay must be at most 100, got {self.weight_decay}")
        if self.epochs > 1e9:
            raise ValueError(f"epochs must be at most 1e9, got {self.epochs}")
        if not 0 <= self.pct_start <= 1:
            raise ValueError(f"pct_start must be in [0, 1], got {self.pct_start}")


class Stage(nn.Module):
    """Base of all stages. `encoder` is the part that is handed on and exported."""

    Config: ClassVar[type[StageConfig]]
    name: ClassVar[str]
    min_atoms: ClassVar[int] = 1
    """Smaller crystals are left out of this stage's stream."""

    encoder: Encoder
    config: Any
    weights: Mapping[str, float]
    """Terms that enter the loss, with their weights."""

    def transform(self) -> Transform | None:
        """What the loader does to a crystal before its graph is built."""
        return None

    @abstractmethod
    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        """Loss terms and metrics of a batch. Draws come from `batch.key` (models/ops/keyed_random.py)."""

    def warnings(self, means: Mapping[str, float]) -> list[str]:
        """Sentences for the log if these averaged metrics are a sign of trouble."""
        return []


STAGES: Registry[type[Stage]] = Registry("stage")
"""Pretraining stages: built as `cls(config, encoder)`."""


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(p.numel() for p in module.parameters())
