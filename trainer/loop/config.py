"""The `trainer` section of a config: how a run is run, whatever is learned."""

from __future__ import annotations

from dataclasses import dataclass

from crysforge.trainer.engines.base import EngineConfig

_LEAST = {
    **dict.fromkeys(("log_every", "keep", "max_skipped"), 1),
    **dict.fromkeys(("validate_every", "checkpoint_every", "checkpoint_minutes"), 0),
    **dict.fromkeys(("milestone_every", "spike_factor", "step_timeout_s"), 0),
    **dict.fromkeys(("walltime_minutes", "walltime_margin_minutes"), 0),
}
"""Least values of settings."""
_MOST = 1e9
"""Largest value of any of them; in seconds, 30 years."""


@dataclass(kw_only=True)
class TrainerConfig(EngineConfig):
    """How a run is run: hardware settings, logging, validation, checkpoints, guards."""

    log_every: int = 20
    """Optimiser steps between logged averages."""
    validate_every: float = 1.0
    """Epochs between validations; one more follows the last step."""
    checkpoint_every: int = 1000
    """Optimiser steps between checkpoints; 0 saves by time only."""
    checkpoint_minutes: float = 15.0
    """Minutes between checkpoints; 0 saves by steps only."""
    keep: int = 2
    """Checkpoints kept per stage."""
    milestone_every: int = 0
    """Optimiser steps between checkpoints that are kept for good; 0 keeps none."""
    ema_decay: float = 0.0
    """Decay of a running average of the weights, which is then validated and exported; 0: none."""
    max_skipped: int = 20
    """Updates skipped in a row, as loss or gradient are non-finite, before the run stops."""
    spike_factor: float = 5.0
    """Warns of a loss so many times the running median; 0 never does."""
    step_timeout_s: float = 1800.0
    """Ends a process that makes no progress for so long, with all stacks in RUN/stacks; 0 never."""
    try_largest: bool | None = None
    """Whether a batch of the largest crystals is tried before step 1; by default on GPUs."""
    profile_steps: list[int] | None = None
    """First and last optimiser step of a profile, written for TensorBoard."""
    walltime_minutes: float | None = None
    """Time the job has; it saves and exits with code 75 before. Slurm's own limit is known."""
    walltime_margin_minutes: float = 3.0
    """Time kept for the last save; a fifth of the walltime where that is less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= _MOST:
                raise ValueError(
                    f"trainer.{name} must be at least {least} and at most {_MOST:.0e}, got {value}"
                )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"trainer.ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.ema_decay and self.zero_stage == 3:
            raise ValueError("trainer.ema_decay needs whole weights on every rank: zero_stage 0-2")
        window = self.profile_steps
        if window is not None and not (len(window) == 2 and 1 <= window[0] <= window[1]):
            raise ValueError(f"trainer.profile_steps must be [first, last], got {window}")
