"""Features that turn with the crystal: scalars, vectors and tensors, and layers that respect this.

Features are a list with a tensor [n, 2l + 1, C_l] for each degree l = 0, 1, …; a rotation mixes the
components of a degree, all of whose channels turn alike. The basis of a degree is that of
`models.layers.spherical`. Parity is left out: these layers are equivariant to proper rotations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.models.layers.spherical import spherical_harmonics

Features = list[Tensor]

BLOCK = 256
"""Edges whose products are made at once on CPU: 3 MB at the published size."""


def flatten(x: Features) -> Tensor:
    """[n, Σ (2l + 1) C_l]."""
    return torch.cat([part.flatten(1) for part in x], dim=1)


def unflatten(x: Tensor, channels: Sequence[int]) -> Features:
    """Features with these channels from one tensor, degree after degree."""
    parts = x.split([(2 * l + 1) * c for l, c in enumerate(channels)], dim=1)
    return [
        part.unflatten(1, (2 * l + 1, c))
        for l, (part, c) in enumerate(zip(parts, channels, strict=True))
    ]


def rotation_matrix(degree: int, rotation: np.ndarray) -> np.ndarray:
    """What a rotation [3, 3] does to the harmonics of a degree, [2l + 1, 2l + 1]: the one matrix D
    with y(R r) = D y(r) for all r."""
    # Directions on a spiral: more than enough to tell the harmonics apart.
    t = np.arange(8 * degree + 8) + 0.5
    z, turn = 1 - 2 * t / len(t), t * math.pi * (1 + math.sqrt(5))
    r = np.stack([np.cos(turn), np.sin(turn), z], axis=1)
    r[:, :2] *= np.sqrt(1 - z**2)[:, None]
    before, after = (
        spherical_harmonics(torch.from_numpy(x), degree + 1)[:, degree**2 :].numpy()
        for x in (r, r @ rotation.T)
    )
    return np.linalg.lstsq(before, after, rcond=None)[0].T


@functools.cache
def coupling(a: int, b: int, c: int) -> np.ndarray:
    """Clebsch-Gordan coefficients [2a + 1, 2b + 1, 2c + 1] of real harmonics: the one tensor, up to
    its size and sign, that no rotation changes. Squares add up to 1; the first entry that is not
    zero is positive.

    Raises:
        ValueError: degrees that do not couple.
    """
    if not abs(a - b) <= c <= a + b:
        raise ValueError(f"degrees {a} and {b} do not couple to {c}")
    cos, sin = math.cos(1.0), math.sin(1.0)
    size = (2 * a + 1) * (2 * b + 1) * (2 * c + 1)
    conditions = []
    # Turns by 1 radian about two axes generate all rotations.
    for rotation in (
        [[1, 0, 0], [0, cos, -sin], [0, sin, cos]],
        [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]],
    ):
        turns = (rotation_matrix(l, np.array(rotation)) for l in (a, b, c))
        conditions.append(functools.reduce(np.kron, turns) - np.eye(size))
    out = np.linalg.svd(np.concatenate(conditions))[2][-1]
    out[np.abs(out) < 1e-9] = 0
    return (out * np.sign(out[out.nonzero()[0][0]])).reshape(2 * a + 1, 2 * b + 1, 2 * c + 1)


def unit_moment(f: Callable[[Tensor], Tensor]) -> float:
    """The factor that makes the mean square of f 1 over standard normal numbers."""
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    density = torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(f(x) ** 2 * density, x) ** -0.5)


SILU, SIGMOID = unit_moment(F.silu), unit_moment(torch.sigmoid)


class IrrepLinear(nn.Module):
    """A linear layer for each degree that is both in and out, with a bias on scalars. Weights start
    with variance 1 over the number of inputs."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        layers = [
            nn.Linear(i, o, bias=bias and l == 0)
            for l, (i, o) in enumerate(zip(inputs, outputs, strict=False))
        ]
        for layer in layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        if bias:
            nn.init.zeros_(layers[0].bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Features) -> Features:
        """Features with the outputs' channels."""
        return [layer(part) for layer, part in zip(self.layers, x, strict=False)]


class IrrepNorm(nn.Module):
    """Layer norm of scalars; other degrees are divided by the root mean square of all features,
    every degree with equal weight, and scaled channel by channel. In fp32 or wider.

    Equiformer divides each degree by its own. But where symmetry makes a degree vanish, as it does
    with the vectors and tensors of a cubic crystal, this would blow rounding errors up to features
    of usual size, which depend on how the crystal lies in space.
    """

    def __init__(self, channels: Sequence[int], eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scalars = nn.LayerNorm(channels[0], eps)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(c)) for c in channels[1:])

    def forward(self, x: Features) -> Features:
        """The same channels."""
        squares = [part.square().mean((1, 2), keepdim=True) for part in x]
        rstd = torch.rsqrt(torch.stack(squares).mean(0) + self.eps)
        scaled = (part * rstd * scale for part, scale in zip(x[1:], self.scales, strict=True))
        return [self.scalars(x[0]), *scaled]


def gated_channels(channels: Sequence[int]) -> tuple[int, ...]:
    """The channels that `gate` needs to make these: scalars and a gate for every other channel."""
    return (sum(channels), *channels[1:])


def gate(x: Features) -> Features:
    """The first scalars through a SiLU; every other channel times the sigmoid of its own scalar."""
    others = [part.shape[2] for part in x[1:]]
    scalars, *gates = x[0].split([x[0].shape[2] - sum(others), *others], dim=2)
    gated = [part * (SIGMOID * torch.sigmoid(g)) for part, g in zip(x[1:], gates, strict=True)]
    return [SILU * F.silu(scalars), *gated]
