"""A running average of the weights, for validation and export (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential average of parameters and floating-point buffers.

    The decay after t steps is min(decay, (1 + t) / (10 + t)), so that the first weights fade.

    Args:
        module: holds whole weights: not under ZeRO 3.
        decay: share of the old average that stays in a step.
        values: an average to go on from.
    """

    def __init__(
        self, module: nn.Module, decay: float, values: Mapping[str, Tensor] | None = None
    ) -> None:
        self.decay = decay
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._live = {name: t for name, t in named.items() if t.is_floating_point()}
        start = values or self._live
        self.values = {
            name: start[name].detach().to(live.device, copy=True)
            for name, live in self._live.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimiser step `step` (from 1)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self._live.values()), weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the module's weights and the average."""
        for name, live in self._live.items():
            kept = live.clone()
            live.copy_(self.values[name])
            self.values[name].copy_(kept)

    def on_host(self) -> dict[str, Tensor]:
        """A copy of the average on the CPU."""
        return {name: value.to("cpu", copy=True) for name, value in self.values.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averaged weights inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
