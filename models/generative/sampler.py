"""Walks from the prior to clean fields along a grid of levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from crysforge.datapipe.common.names import nearest
from crysforge.models.generative.guidance import Guidance
from crysforge.models.generative.process import FieldProcess, Move
from crysforge.models.generative.rows import Packing, Rows

METHODS = ("euler", "heun", "ancestral")
Fields = dict[str, Tensor]
Denoiser = Callable[[Fields, Tensor], Fields]
"""(fields, levels [B]) → predictions by field."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How samples are drawn."""

    steps: int = 50
    """Steps from the prior to clean."""
    method: str = "euler"
    """`euler` (diffusions follow their deterministic flow), `heun` (flows alone; two calls a step),
    `ancestral` (diffusions draw noise in every step)."""
    corrector: float = 0.0
    """Langevin correction before each step, in units of the noise's variance; 0: none. Costs one
    more call a step. DiffCSP's step_lr over 2.5e-5: 0.4 on MP-20, 0.02 on Perov-5."""
    anneal: dict[str, float] = field(default_factory=dict)
    """Slope of the velocity annealing of each field."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampling.steps must be at least 1, got {self.steps}")
        if self.method not in METHODS:
            raise ValueError(
                f"unknown sampling.method {self.method!r}: {nearest(self.method, METHODS)}"
            )
        for name, value in {"corrector": self.corrector, **self.anneal}.items():
            if not 0 <= value < 1e6:
                raise ValueError(f"sampling: {name} must not be negative, got {value}")

    @property
    def calls(self) -> int:
        """Network calls for one sample."""
        second = self.steps - 1 if self.method == "heun" else 0
        return self.steps * (2 if self.corrector else 1) + second


@dataclass(frozen=True)
class Field:
    """A field of a state."""

    process: FieldProcess
    of_members: bool
    """Whether it has a row for each member, or one for each group."""


def check(sampling: SamplingConfig, fields: Mapping[str, Field]) -> None:
    """Raises ValueError if these fields cannot be sampled so."""
    for name in sampling.anneal:
        if name not in fields:
            raise ValueError(f"sampling.anneal names {name!r}: {nearest(name, fields)}")
    moving = [f.process for f in fields.values()]
    most = max((p.levels for p in moving), default=0)
    if most and sampling.steps > most:
        raise ValueError(f"sampling.steps={sampling.steps}, but the model has {most} levels")
    if sampling.method == "heun" and any(p.levels for p in moving):
        raise ValueError("sampling.method=heun is for flows: take euler or ancestral")


def grid(sampling: SamplingConfig, fields: Mapping[str, Field]) -> list[float]:
    """Levels from 1 to 0; those of a model that has only some are rounded to them."""
    most = max((f.process.levels for f in fields.values()), default=0)
    levels = [1 - i / sampling.steps for i in range(sampling.steps + 1)]
    return [round(u * most) / most for u in levels] if most else levels


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    fields: Mapping[str, Field],
    packing: Packing,
    sampling: SamplingConfig,
    given: Mapping[str, Tensor] | None = None,
    guidance: Guidance | None = None,
    watch: Callable[[float, Fields], None] | None = None,
) -> Fields:
    """Clean fields.

    Args:
        given: values of fields that are known from the start.
        watch: is shown the level and the fields after every step.

    Raises:
        ValueError: settings that do not fit the fields.
    """
    check(sampling, fields)
    rows = {name: packing.rows(name, f.of_members) for name, f in fields.items()}
    state = {n: f.process.prior(rows[n]) for n, f in fields.items() if n not in (given or {})}
    state |= dict(given or {})
    levels = grid(sampling, fields)
    for number, (now, then) in enumerate(pairwise(levels)):
        move = Move(now, then, number, stochastic=sampling.method == "ancestral")
        moves = {n: replace(move, slope=sampling.anneal.get(n, 0.0)) for n in fields}
        state = _step(denoiser, fields, rows, state, moves, packing, sampling, guidance)
        if watch is not None:
            watch(then, state)
    return state


def _step(
    denoiser: Denoiser,
    fields: Mapping[str, Field],
    rows: Mapping[str, Rows],
    state: Fields,
    moves: Mapping[str, Move],
    packing: Packing,
    sampling: SamplingConfig,
    guidance: Guidance | None,
) -> Fields:
    """One step of all fields."""
    move = next(iter(moves.values()))
    now, then = (
        torch.full(packing.key.shape, u, dtype=packing.dtype, device=packing.key.device)
        for u in (move.now, move.then)
    )

    def moved(state: Fields, predictions: Fields) -> Fields:
        return {
            n: f.process.step(state[n], predictions[n], moves[n], rows[n])
            if n in predictions
            else state[n]
            for n, f in fields.items()
        }

    if sampling.corrector:
        found = denoiser(state, now)
        state = {
            n: f.process.correct(state[n], found[n], moves[n], sampling.corrector, rows[n])
            if n in found
            else state[n]
            for n, f in fields.items()
        }
    found = denoiser(state, now)
    if sampling.method == "heun" and move.then > 0:
        ahead = denoiser(moved(state, found), then)
        found = {n: (p + ahead[n]) / 2 if fields[n].process.flow else p for n, p in found.items()}
    new = moved(state, found)
    if guidance is not None:
        for name, gradient in guidance.gradients(state, now, packing).items():
            new[name] = fields[name].process.push(new[name], gradient, moves[name])
    return new
