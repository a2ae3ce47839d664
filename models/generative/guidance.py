"""Guidance: samples are pushed down the gradient of an energy of their noisy fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crysforge.models.generative.rows import Packing


@dataclass(frozen=True)
class Guidance:
    """An energy and how strongly it pushes."""

    energy: Callable[[dict[str, Tensor], Tensor, Packing], Tensor]
    """(fields, levels [B], where the groups lie) → one number for each group, [B]."""
    strength: float
    fields: Sequence[str]
    """What is pushed; the others are only seen."""

    def gradients(
        self, state: dict[str, Tensor], level: Tensor, packing: Packing
    ) -> dict[str, Tensor]:
        """Strength times the energy's gradient with respect to each field that is pushed; weights
        of the energy get none."""
        with torch.enable_grad():
            pushed = {n: state[n].detach().requires_grad_() for n in self.fields}
            energy = self.energy({**state, **pushed}, level, packing)
            found = torch.autograd.grad(energy.sum(), list(pushed.values()))
        return {n: self.strength * g for n, g in zip(pushed, found, strict=True)}
