"""Flows: straight ways between prior and clean, in space and on the torus; and discrete fields that
are uncovered one by one.

Flow matching (Lipman et al. 2023) with the torus' shortest ways (FlowMM, Miller et al. 2024);
masked-discrete processes as in MDLM (Sahoo et al. 2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crysforge.models.generative.process import NOISE, PRIOR, STEP, FieldProcess, Move, salt
from crysforge.models.generative.rows import Rows


class Linear(FieldProcess):
    """x_u = (1 − u) x₀ + u ε; the target is the velocity x₀ − ε, or x₀ itself.

    Args:
        predicts_clean: whether the denoiser's output is the clean field.
        centred: whether the prior has no mean over a group.
    """

    flow = True

    def __init__(self, width: int, *, predicts_clean: bool = False, centred: bool = False) -> None:
        self.width, self.predicts_clean, self._centred = width, predicts_clean, centred

    def _noise(self, rows: Rows, purpose: int) -> Tensor:
        noise = rows.normal(self.width, salt(purpose))
        return rows.centred(noise) if self._centred else noise

    def prior(self, rows: Rows) -> Tensor:
        return self._noise(rows, PRIOR)

    def corrupt(self, clean: Tensor, level: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        noise = self._noise(rows, NOISE)
        target = clean if self.predicts_clean else clean - noise
        return clean + level * (noise - clean), target

    def step(self, x: Tensor, prediction: Tensor, move: Move, rows: Rows) -> Tensor:
        velocity = (prediction - x) / move.now if self.predicts_clean else prediction
        return x + stride(move) * velocity

    def push(self, x: Tensor, gradient: Tensor, move: Move) -> Tensor:
        return x - (move.now - move.then) * gradient


class TorusLinear(FieldProcess):
    """The shortest way on the torus from a uniform draw; the target is its velocity, without the
    mean over the group where nobody can know that (`centred`)."""

    flow = True

    def __init__(self, width: int, *, centred: bool = True) -> None:
        self.width, self._centred = width, centred

    def prior(self, rows: Rows) -> Tensor:
        return rows.uniform(self.width, salt(PRIOR))

    def corrupt(self, clean: Tensor, level: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        way = clean - rows.uniform(self.width, salt(NOISE))
        way = way - way.round()
        return (clean - level * way) % 1, rows.centred(way) if self._centred else way

    def step(self, x: Tensor, prediction: Tensor, move: Move, rows: Rows) -> Tensor:
        return (x + stride(move) * prediction) % 1

    def push(self, x: Tensor, gradient: Tensor, move: Move) -> Tensor:
        return (x - (move.now - move.then) * gradient) % 1


class MaskedDiscrete(FieldProcess):
    """Classes 1 … `classes` that are hidden (0) with the probability of the level. The prediction
    is logits [R, classes]; a step uncovers as many as the levels say, each by a draw."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def prior(self, rows: Rows) -> Tensor:
        return torch.zeros_like(rows.group)

    def corrupt(self, clean: Tensor, level: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        hidden = rows.uniform(1, salt(NOISE)) < level
        return torch.where(hidden[:, 0], 0, clean), clean

    def step(self, x: Tensor, prediction: Tensor, move: Move, rows: Rows) -> Tensor:
        draw = rows.uniform(2, salt(STEP, move.number))
        uncovered = draw[:, 0] < (move.now - move.then) / move.now
        share = prediction.double().softmax(1).cumsum(1)
        found = 1 + (share < draw[:, 1:].double() * share[:, -1:]).sum(1)
        return torch.where((x == 0) & uncovered, found.clamp(max=self.classes), x)

    def error(self, prediction: Tensor, target: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of the hidden ones."""
        hidden = (x == 0).to(prediction.dtype)
        loss = F.cross_entropy(prediction, target - 1, reduction="none")
        return (loss * hidden).sum(), hidden.sum()


def stride(move: Move) -> float:
    """How far along a velocity a step goes: annealed, and never beyond the end."""
    longer = 1 + move.slope * (1 - move.now)
    return min(longer * (move.now - move.then), move.now)
