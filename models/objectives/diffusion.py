"""Diffusion schedules and the score of wrapped normal noise, as in DiffCSP.

Levels t run from 0 (clean) to T. Tables are fp64 on the host: they are made once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

IMAGES = 10
"""Periods on either side that the wrapped normal density sums over."""

SIGMA_RANGE = (0.005, 0.5)
"""Noise of fractional coordinates at t = 1 and t = T. At the last one they are uniform to 1.4 %."""


def cosine_alpha_bar(steps: int) -> Tensor:
    """[T+1] share of the signal's variance that is left (Nichol and Dhariwal, 2021; s = 0.008),
    with each step's β in [1e-4, 0.9999]."""
    x = torch.arange(steps + 1, dtype=torch.float64) / steps
    curve = torch.cos((x + 0.008) / 1.008 * math.pi / 2).square()
    beta = (1 - curve[1:] / curve[:-1]).clamp(1e-4, 0.9999)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


def wrapped_sigma(steps: int) -> Tensor:
    """[T+1] noise of fractional coordinates: 0, then geometric over `SIGMA_RANGE`."""
    low, high = SIGMA_RANGE
    ratio = torch.linspace(0, 1, steps, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), low * (high / low) ** ratio])


def wrapped_score(x: Tensor, sigma: Tensor) -> Tensor:
    """Minus the gradient of the log-density of N(0, σ²) wrapped to period one, at x; of broadcast
    shape. The sign is that of the noise, x/σ² where σ is small: a sampler subtracts it."""
    shifted = x[..., None] + torch.arange(-IMAGES, IMAGES + 1, device=x.device)
    variance = sigma.square()[..., None]
    share = torch.softmax(-shifted.square() / (2 * variance), dim=-1)
    return (share * shifted / variance).sum(dim=-1)


def score_norm(sigma: Tensor, points: int = 100) -> Tensor:
    """Mean square of `wrapped_score` under its own density, for each positive σ [S].

    By the trapezoidal rule over a period, or over eight σ where that is less: the integrand is
    periodic or has decayed at both ends, so that the error falls faster than any power.
    """
    half = (8 * sigma).clamp(max=0.5)
    x = half[:, None] * torch.linspace(-1, 1, 2 * points + 1, dtype=sigma.dtype)
    shifted = x[..., None] + torch.arange(-IMAGES, IMAGES + 1)
    density = torch.exp(-shifted.square() / (2 * sigma[:, None, None].square())).sum(dim=-1)
    density[:, [0, -1]] *= 0.5
    score = wrapped_score(x, sigma[:, None].expand_as(x))
    return (density * score.square()).sum(dim=1) / density.sum(dim=1)
