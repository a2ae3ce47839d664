"""Products of irreducible features, channel by channel: the separable tensor product."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from crysforge.models.layers.irreps import BLOCK, Features, IrrepLinear, coupling
from crysforge.models.ops.precision import full_precision


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
    size = BLOCK if x.device.type == "cpu" else max(len(x), 1)
    return [slice(i, min(i + size, len(x))) for i in range(0, len(x), size)]
