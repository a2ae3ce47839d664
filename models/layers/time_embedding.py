"""Times and levels of noise as vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIME_CHANNELS = 256


def time_embedding(t: Tensor) -> Tensor:
    """[B] → [B, 256]: cosines, then sines of t·10000^(−k/128). t is not stretched, so that the
    embedding is smooth in it."""
    half = TIME_CHANNELS // 2
    k = torch.arange(half, device=t.device)
    angle = t[:, None] * torch.exp(-math.log(10000) / half * k)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def timestep_embedding(t: Tensor) -> Tensor:
    """[B] → [B, 256]: sines, then cosines of t·10000^(−k/127), k = 0..127."""
    half = TIME_CHANNELS // 2
    k = torch.arange(half, device=t.device)
    angle = t[:, None] * torch.exp(-math.log(10000) / (half - 1) * k)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
