"""One stage's training on this rank: what is trained, on what, and how; and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from crysforge.datapipe.loading.stream import Stream
from crysforge.trainer.base.distributed import World
from crysforge.trainer.base.signals import StopRequest
from crysforge.trainer.loop.config import TrainerConfig
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.stages.base import Stage, StageConfig


@dataclass(kw_only=True)
class Session:
    """What `fit` is asked for."""

    stage: Stage
    config: StageConfig
    """Of the stage: how long and how fast it learns."""
    trainer: TrainerConfig
    train: Stream
    validation: Stream | None
    run: RunDirectory
    world: World
    monitor: str | None = None
    """Validation average to minimise; the weights of its minimum are kept and are in the stage at
    the end. Without it the last weights are (or their average)."""
    lr_scales: Mapping[str, float] | None = None
    """Prefix of parameter names → factor on the learning rate."""
    patience: int = 0
    """Validations in a row without a new minimum that end the training; 0: none do."""
    stop: StopRequest | None = None
    """Asked after every step whether to save and leave."""


@dataclass
class FitResult:
    """What a finished stage reports."""

    steps: int = 0
    train: dict[str, float] = field(default_factory=dict)
    """Averages over the last logging window."""
    validation: dict[str, float] = field(default_factory=dict)
    """Averages of the kept weights on the validation split."""
    best_step: int = 0
    """Step of the kept weights."""
    stale: int = 0
    """Validations since then."""

    def in_words(self) -> str:
        """One line for the log."""
        shown = ", ".join(f"{k} {v:.4g}" for k, v in self.validation.items())
        kept = f" (of step {self.best_step})" if 0 < self.best_step < self.steps else ""
        shown = f"validation{kept} {shown}" if shown else "no crystals to validate on"
        return f"finished after {self.steps} steps; {shown}"
