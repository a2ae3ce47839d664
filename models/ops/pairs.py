"""All ordered pairs of atoms inside the crystals of a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Where the pairs lie."""

    first: Tensor
    """[P] atom i."""
    second: Tensor
    """[P] atom j."""
    atoms: int
    """A."""

    @classmethod
    def of(cls, ptr: Tensor, sizes: Sequence[int] | None = None) -> Pairs:
        """The pairs of crystals whose atoms start at `ptr` [B+1]."""
        sizes = ptr.diff().tolist() if sizes is None else sizes
        each = ptr.diff()
        crystal = torch.repeat_interleave(each * each, output_size=sum(n * n for n in sizes))
        number = torch.arange(len(crystal), device=ptr.device) - cls.starts(ptr)[crystal]
        n, start = each[crystal], ptr[crystal]
        first = torch.div(number, n, rounding_mode="floor")
        return cls(start + first, start + number - n * first, sum(sizes))

    @staticmethod
    def starts(ptr: Tensor) -> Tensor:
        """[B+1] first pair of each crystal, then P, from the first atoms `ptr` [B+1]."""
        return F.pad(ptr.diff().square().cumsum(0), (1, 0))
