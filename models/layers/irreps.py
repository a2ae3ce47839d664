"""Features that turn with the crystal: scalars, vectors and tensors, and layers that respect this.

Features are a list with a tensor [n, 2l + 1, C_l] for each degree l = 0, 1, …; a rotation mixes the
components of a degree, all of whose channels turn alike. The basis of a degree is that of
`models.layers.spherical`. Parity is left out: these layers are equivariant to proper rotations.
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

from crysforge.models.layers.basic import full_precision
from crysforge.models.layers.spherical import spherical_harmonics

Features = list[Tensor]

_BLOCK = 256
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
        with torch.autocast(harmonics.device.type, enabled=False):  # geometry in full precision
            return [
                (harmonics @ rows.to(harmonics)).unflatten(1, (-1, 2 * a + 1))
                for a, rows in enumerate(self.buffers())
            ]


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
        layers = [cast(nn.Linear, layer) for layer in self.linear.layers]
        linear = [layer.weight for layer in layers]
        if weight.ndim == 1:
            each = weight.split([sum(sizes) for sizes in self.sizes])
            linear = [matrix * w for matrix, w in zip(linear, each, strict=True)]
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x[0].dtype
        with torch.autocast(kind, enabled=False):
            tensors = (t.to(dtype) for t in (*x, *matrices, *linear))
            weights = weight.to(dtype) if weight.ndim == 2 else None
            out = _SeparableProduct.apply(self.sizes, weights, *tensors)
        return [
            part if layer.bias is None else part + layer.bias
            for part, layer in zip(out, layers, strict=True)
        ]


class _SeparableProduct(torch.autograd.Function):
    """Products, times weights if there are any, times the transposed matrices of the linear layers.

    The products are by far the largest tensors of all. So they are made block by block of edges,
    which on CPU then stay in the cache, and made again in the backward pass.
    """

    @staticmethod
    def forward(ctx, sizes, weight, *tensors):
        ctx.save_for_backward(weight, *tensors)
        ctx.sizes = sizes
        x, matrices, linear = _three_parts(tensors, len(sizes[0]))
        out = [x[0].new_zeros(len(x[0]), 2 * c + 1, len(m)) for c, m in enumerate(linear)]
        for edges in _blocks(x[0]):
            weights = _split_weights(weight, sizes, edges)
            for a in range(len(x)):
                rows = _products(x[a][edges], matrices[a][edges], [s[a] for s in sizes])
                for c, z in enumerate(rows):
                    block = linear[c].split(sizes[c], dim=1)[a]
                    p = z if weight is None else z * weights[c][a][:, None]
                    out[c][edges] += p @ block.t()
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        weight, *tensors = ctx.saved_tensors
        sizes = ctx.sizes
        x, matrices, linear = _three_parts(tensors, len(sizes[0]))
        dx = [torch.empty_like(t) for t in x]
        dlinear = [torch.zeros_like(full_precision(t)) for t in linear]
        dweight = None if weight is None else torch.empty_like(weight)
        for edges in _blocks(x[0]):
            weights = _split_weights(weight, sizes, edges)
            dweights = _split_weights(dweight, sizes, edges)
            for a in range(len(x)):
                part, matrix = x[a][edges], matrices[a][edges]
                drows = []
                for c, z in enumerate(_products(part, matrix, [s[a] for s in sizes])):
                    w = None if weight is None else weights[c][a][:, None]
                    p, grad = z if w is None else z * w, grads[c][edges]
                    block = linear[c].split(sizes[c], dim=1)[a]
                    dblock = dlinear[c].split(sizes[c], dim=1)[a]
                    dblock += grad.flatten(0, 1).t() @ p.flatten(0, 1)
                    dp = grad @ block
                    if w is not None:
                        dweights[c][a].copy_((dp * z).sum(1))
                        dp = dp.mul_(w)
                    drows.append(dp.reshape(len(dp), -1, part.shape[2]))
                together = torch.cat(drows, dim=1)
                dx[a][edges] = matrix[:, : together.shape[1]].transpose(1, 2) @ together
        return None, dweight, *dx, *([None] * len(x)), *dlinear


def _three_parts(tensors: Sequence[Tensor], degrees: int):
    """Features and `Couplings`, of each degree, and matrices of the linear layers."""
    return tensors[:degrees], tensors[degrees : 2 * degrees], tensors[2 * degrees :]


def _products(part: Tensor, matrix: Tensor, channels: Sequence[int]) -> Features:
    """A degree's products [E, 2c + 1, channels[c]] for each c, from features [E, 2a + 1, C] and the
    rows of `Couplings` for it."""
    counts = [(2 * c + 1) * n // part.shape[2] for c, n in enumerate(channels)]
    rows = (matrix[:, : sum(counts)] @ part).split(counts, dim=1)
    return [
        z.reshape(len(z), 2 * c + 1, n) for c, (z, n) in enumerate(zip(rows, channels, strict=True))
    ]


def _split_weights(weight: Tensor | None, sizes: list[list[int]], edges: slice) -> list[Features]:
    """The weights of an edge's paths for each c and a."""
    if weight is None:
        return []
    each = weight[edges].split([sum(s) for s in sizes], dim=1)
    return [list(w.split(s, dim=1)) for w, s in zip(each, sizes, strict=True)]


def _blocks(x: Tensor) -> list[slice]:
    """Runs of edges; on GPUs one of all."""
    size = _BLOCK if x.device.type == "cpu" else max(len(x), 1)
    return [slice(i, min(i + size, len(x))) for i in range(0, len(x), size)]
