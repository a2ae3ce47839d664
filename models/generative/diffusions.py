"""Diffusions with a table of levels: variance-preserving, and wrapped normal on the torus.

After DDPM (Ho et al. 2020), and DiffCSP's score matching on the torus (Jiao et al. 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crysforge.models.generative.process import (
    CORRECT,
    NOISE,
    PRIOR,
    STEP,
    FieldProcess,
    Move,
    salt,
)
from crysforge.models.generative.rows import Rows
from crysforge.models.objectives.diffusion import (
    cosine_alpha_bar,
    score_norm,
    wrapped_score,
    wrapped_sigma,
)

LEAST_SIGNAL = 1e-2
"""Least share of the signal's variance that is taken to be left over a step of several levels. The
last levels of a cosine schedule have next to none: errors of the prediction would be multiplied by
thousands there. Over a step of one level the schedule's own bound of 1e-4 holds."""


class GaussianDiffusion(FieldProcess):
    """x_u = √ᾱ x₀ + √(1 − ᾱ) ε with the cosine schedule; the target is ε."""

    def __init__(self, width: int, levels: int) -> None:
        self.width, self.levels = width, levels
        self.alpha_bar = cosine_alpha_bar(levels)

    def prior(self, rows: Rows) -> Tensor:
        return rows.normal(self.width, salt(PRIOR))

    def corrupt(self, clean: Tensor, level: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        noise = rows.normal(self.width, salt(NOISE))
        keep = _at(self.alpha_bar, level, self.levels).to(clean.dtype)
        return keep.sqrt() * clean + (1 - keep).sqrt() * noise, noise

    def step(self, x: Tensor, prediction: Tensor, move: Move, rows: Rows) -> Tensor:
        now, then = (self._signal(level) for level in (move.now, move.then))
        one_level = round((move.now - move.then) * self.levels) <= 1
        alpha = max(now / then, 1e-4 if one_level else LEAST_SIGNAL)
        if move.stochastic:
            mean = (x - (1 - alpha) / math.sqrt(1 - now) * prediction) / math.sqrt(alpha)
            return mean + self._spread(move) * rows.normal(self.width, salt(STEP, move.number))
        now = max(now, alpha * then)
        clean = (x - math.sqrt(1 - now) * prediction) / math.sqrt(now)
        return math.sqrt(then) * clean + math.sqrt(1 - then) * prediction

    def push(self, x: Tensor, gradient: Tensor, move: Move) -> Tensor:
        return x - self._spread(move) ** 2 * gradient

    def _signal(self, level: float) -> float:
        return float(self.alpha_bar[round(level * self.levels)])

    def _spread(self, move: Move) -> float:
        """Standard deviation of the posterior of a step."""
        now, then = self._signal(move.now), self._signal(move.then)
        return math.sqrt((1 - now / then) * (1 - then) / (1 - now))


class WrappedDiffusion(FieldProcess):
    """x_u = x₀ + σ ε modulo 1 with a geometric σ; the target is minus the score over its root mean
    square at the level."""

    def __init__(self, width: int, levels: int) -> None:
        self.width, self.levels = width, levels
        self.sigma = wrapped_sigma(levels)
        self.scale = torch.cat([self.sigma.new_ones(1), score_norm(self.sigma[1:]).sqrt()])
        """[T+1] root mean square of the score."""

    def prior(self, rows: Rows) -> Tensor:
        return rows.uniform(self.width, salt(PRIOR))

    def corrupt(self, clean: Tensor, level: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        sigma, scale = (
            _at(table, level, self.levels).to(clean.dtype) for table in (self.sigma, self.scale)
        )
        moved = sigma * rows.normal(self.width, salt(NOISE))
        return (clean + moved) % 1, wrapped_score(moved, sigma) / scale

    def step(self, x: Tensor, prediction: Tensor, move: Move, rows: Rows) -> Tensor:
        (sigma, scale), (then, _) = self._tables(move.now), self._tables(move.then)
        slope = scale * prediction
        if not move.stochastic:
            longer = 1 + move.slope * (1 - move.now)
            return (x - min(longer * sigma * (sigma - then), sigma**2) * slope) % 1
        noise = rows.normal(self.width, salt(STEP, move.number))
        return (x - (sigma**2 - then**2) * slope + self._spread(move) * noise) % 1

    def correct(
        self, x: Tensor, prediction: Tensor, move: Move, ratio: float, rows: Rows
    ) -> Tensor:
        sigma, scale = self._tables(move.now)
        size = ratio * sigma**2
        moved = x - size * scale * prediction
        if move.then > 0:
            noise = rows.normal(self.width, salt(CORRECT, move.number))
            moved = moved + math.sqrt(2 * size) * noise
        return moved % 1

    def push(self, x: Tensor, gradient: Tensor, move: Move) -> Tensor:
        return (x - self._spread(move) ** 2 * gradient) % 1

    def _tables(self, level: float) -> tuple[float, float]:
        index = round(level * self.levels)
        return float(self.sigma[index]), float(self.scale[index])

    def _spread(self, move: Move) -> float:
        sigma, then = self._tables(move.now)[0], self._tables(move.then)[0]
        return then * math.sqrt(sigma**2 - then**2) / sigma


def _at(table: Tensor, level: Tensor, levels: int) -> Tensor:
    """Entries of a table [T+1] at levels, of their shape."""
    return table.to(level.device)[(level * levels).round().long()]
