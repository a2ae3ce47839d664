"""Features that turn with the crystal: scalars, vectors and tensors, and layers that respect this.

Features are a list with a tensor [n, 2l + 1, C_l] for each degree l = 0, 1, …; a rotation mixes the
components of a degree, all of whose channels turn alike. The basis of a degree is that of
`models.spherical`. Parity is left out: what these layers make is equivariant to proper rotations.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.spherical import spherical_harmonics

Features = list[Tensor]


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


class Couplings(nn.Module):
    """An edge's harmonics as matrices that take features to their products with them; the same in
    all layers.

    Path (a, b, c) takes features of degree a and harmonics of degree b to degree c. The rows of the
    matrix for degree a are ordered by c, then component of c, then b.
    """

    def __init__(self, degrees: int) -> None:
        super().__init__()
        for a in range(degrees):
            self.register_buffer(str(a), torch.from_numpy(_rows(a, degrees)), persistent=False)

    def forward(self, harmonics: Tensor) -> list[Tensor]:
        """[E, rows, 2a + 1] for each a, from harmonics [E, degrees²] whose squares add up to 1 in
        each degree."""
        return [
            (harmonics @ rows.to(harmonics)).unflatten(1, (-1, 2 * a + 1))
            for a, rows in enumerate(self.buffers())
        ]


def products(x: Features, matrices: Sequence[Tensor], outputs: int) -> list[Features]:
    """All products of the degrees 0 … outputs - 1: for each degree a of x [E, 2a + 1, C_a] a list
    with a tensor [E, 2c + 1, b · C_a] for each c."""
    out = []
    for a, (part, matrix) in enumerate(zip(x, matrices, strict=True)):
        counts = [len(partners(a, c, len(x))) for c in range(outputs)]
        sizes = [(2 * c + 1) * count for c, count in enumerate(counts)]
        rows = (matrix[:, : sum(sizes)] @ part).split(sizes, dim=1)
        shapes = ((len(part), 2 * c + 1, n * part.shape[2]) for c, n in enumerate(counts))
        out.append([z.reshape(shape) for z, shape in zip(rows, shapes, strict=True)])
    return out


def partners(a: int, c: int, degrees: int) -> list[int]:
    """The degrees below `degrees` that couple a to c."""
    return [b for b in range(degrees) if abs(a - b) <= c <= a + b]


@functools.cache
def _rows(a: int, degrees: int) -> np.ndarray:
    """[degrees², rows · (2a + 1)]: takes harmonics to the matrix of `Couplings`. Components of what
    it makes of features and harmonics with components of unit variance have unit variance."""
    rows = []
    for c in range(degrees):
        for k, b in itertools.product(range(2 * c + 1), partners(a, c, degrees)):
            block = np.zeros((degrees**2, 2 * a + 1))
            scale = math.sqrt((2 * b + 1) * (2 * c + 1))
            block[b**2 : (b + 1) ** 2] = scale * coupling(a, b, c)[:, :, k].T
            rows.append(block)
    return np.concatenate(rows, axis=1)


class SeparableProduct(nn.Module):
    """Depthwise tensor product with the harmonics, each path and channel with a weight, and then a
    linear layer for each degree (Liao and Smidt, ICLR 2023, Section 4.1)."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        degrees = len(inputs)
        self.outputs = len(outputs)
        self.sizes = [
            [len(partners(a, c, degrees)) * channels for a, channels in enumerate(inputs)]
            for c in range(self.outputs)
        ]
        self.linear = IrrepLinear([sum(sizes) for sizes in self.sizes], outputs)

    @property
    def numel(self) -> int:
        """Weights of the paths: ordered by c, then a, then b, then channel."""
        return sum(map(sum, self.sizes))

    def forward(self, x: Features, matrices: Sequence[Tensor], weight: Tensor) -> Features:
        """Features of edges from features and `Couplings` of edges and weights [E, numel], or
        [numel] for all edges."""
        every = products(x, matrices, self.outputs)
        weights = weight.split([sum(sizes) for sizes in self.sizes], dim=-1)
        return [
            self._linear(c, [of_degree[c] for of_degree in every], w) for c, w in enumerate(weights)
        ]

    def _linear(self, c: int, parts: Features, weight: Tensor) -> Tensor:
        """Degree c of the result: one linear layer over the products of all degrees, not joined."""
        layer, sizes = cast(nn.Linear, self.linear.layers[c]), self.sizes[c]
        matrix = layer.weight
        if weight.ndim == 1:
            matrix = matrix * weight
        else:
            factors = weight.split(sizes, dim=1)
            parts = [p * f[:, None] for p, f in zip(parts, factors, strict=True)]
        out = F.linear(parts[0], matrix[:, : sizes[0]], layer.bias)
        for part, block in zip(parts[1:], matrix.split(sizes, dim=1)[1:], strict=True):
            out = out + F.linear(part, block)
        return out
