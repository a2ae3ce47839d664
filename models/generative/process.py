"""How a field is corrupted and stepped back.

A level u runs from 1 (drawn from the prior) to 0 (clean). A denoiser sees a corrupted state and its
level and predicts, for each field, what the field's process calls its target; a process turns
predictions into steps to a lower level.

Letters: R rows of a field, C its columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from crysforge.models.generative.rows import Rows

PRIOR, NOISE, STEP, CORRECT = range(4)
"""Purposes of draws."""
_PURPOSES = 4


def salt(purpose: int, step: int = 0) -> int:
    """Of a draw for a purpose in a step."""
    return _PURPOSES * step + purpose


@dataclass(frozen=True)
class Move:
    """A step between two levels."""

    now: float
    then: float
    """Below `now`."""
    number: int = 0
    """Of the step, for its draws."""
    slope: float = 0.0
    """Velocity annealing: a step is longer by 1 + slope · (1 − now), but never beyond where the
    prediction says the end is."""
    stochastic: bool = True
    """Whether a diffusion draws noise in a step, or follows the flow of equal marginals."""


class FieldProcess(ABC):
    """A field's way between clean and prior. Levels are [R, 1] or numbers."""

    levels: int = 0
    """Levels that exist above 0, evenly spaced; 0: all of (0, 1]."""
    flow: bool = False
    """Whether predictions are velocities, which may be averaged."""

    @abstractmethod
    def prior(self, rows: Rows) -> Tensor:
        """A draw at level 1, [R, C]."""

    @abstractmethod
    def corrupt(self, clean: Tensor, level: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The field at levels [R, 1], and the target of the prediction there."""

    @abstractmethod
    def step(self, x: Tensor, prediction: Tensor, move: Move, rows: Rows) -> Tensor:
        """The field at a lower level."""

    def correct(
        self, x: Tensor, prediction: Tensor, move: Move, ratio: float, rows: Rows
    ) -> Tensor:
        """A Langevin step at the same level, where the process has one. `ratio` is its size in
        units of the noise's variance."""
        return x

    def push(self, x: Tensor, gradient: Tensor, move: Move) -> Tensor:
        """The field moved against the gradient of an energy, by what a step leaves open."""
        return x

    def error(self, prediction: Tensor, target: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count of a loss: here the squared error."""
        square = (prediction - target).square()
        return square.sum(), square.new_full((), square.numel())


class Fixed(FieldProcess):
    """A field that is known and stays."""

    def prior(self, rows: Rows) -> Tensor:
        raise ValueError("a fixed field has no prior: it must be given")

    def corrupt(self, clean: Tensor, level: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return clean, torch.zeros_like(clean)

    def step(self, x: Tensor, prediction: Tensor, move: Move, rows: Rows) -> Tensor:
        return x
