"""Sums over edges, norms and losses are taken in fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """x in fp32 or wider, as sums over edges need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
