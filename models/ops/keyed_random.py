"""Random numbers that depend on keys alone.

Every draw of a training step (latent noise, flow time, dropout) is a pure function of the
crystal's key, which is a hash of (seed, epoch, crystal id). So a draw does not depend on the
number of ranks, on the order of a batch or on what was drawn before; a resumed or rescaled run
draws what the uninterrupted one would have drawn, and no generator state needs saving.

Method: SplitMix64 finaliser on int64 (Steele, Lea, Flood, OOPSLA 2014), then Box-Muller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as signed 64 bit
_M1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_M2 = -7723592293110705685  # 0x94D049BB133111EB


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 finaliser; int64 wraps, shifts are made logical by a mask."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _M1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _M2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def derive(keys: Tensor, salt: int | Tensor) -> Tensor:
    """New independent keys from keys (int64, any shape) and a salt (int, or int64 tensor)."""
    step = (salt + 1) * _GOLDEN
    if isinstance(step, int):  # Python's integers do not wrap at 64 bits
        step = (step + (1 << 63)) % (1 << 64) - (1 << 63)
    return _mix(keys + step)


def member_keys(key: Tensor, batch: Tensor, ptr: Tensor) -> Tensor:
    """A key for every atom, [A], from the keys of the crystals [B] and the atom's number within
    its crystal; `batch` [A] and `ptr` [B+1] as in CrystalBatch."""
    number = torch.arange(len(batch), device=batch.device) - ptr[batch]
    return derive(key[batch], number)


def _bits(keys: Tensor, width: int, salt: int) -> Tensor:
    column = torch.arange(1, width + 1, device=keys.device) * _GOLDEN
    return _mix(derive(keys, salt)[:, None] + column)


def keyed_uniform(keys: Tensor, width: int, salt: int) -> Tensor:
    """Uniform numbers in [0, 1), fp32 [n, width], from keys [n]; one salt per purpose."""
    return ((_bits(keys, width, salt) >> 40) & 0xFFFFFF).float() / (1 << 24)


def keyed_normal(keys: Tensor, width: int, salt: int) -> Tensor:
    """Standard normal numbers, fp32 [n, width], from keys [n]; one salt per purpose."""
    bits = _bits(keys, (width + 1) // 2, salt)
    radius = (((bits >> 40) & 0xFFFFFF).float() + 0.5) / (1 << 24)
    angle = ((bits >> 8) & 0xFFFFFF).float() * (2 * math.pi / (1 << 24))
    radius = torch.sqrt(-2 * torch.log(radius))
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :width]


def keyed_dropout(x: Tensor, keys: Tensor, p: float, salt: int, training: bool) -> Tensor:
    """Dropout of x [n, width] with probability p, drawn from keys [n]. On a quotient graph a
    node's channels drop for all atoms the node stands for."""
    if not training or p == 0:
        return x
    keep = keyed_uniform(keys, x.shape[1], salt) >= p
    return x * keep.to(x.dtype) / (1 - p)
