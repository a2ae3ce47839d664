"""Functions on a ball and its surface: spherical Bessel functions, real spherical harmonics."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn

from crysforge.models.ops.precision import full_precision


def spherical_harmonics(unit: Tensor, degrees: int) -> Tensor:
    """Real spherical harmonics of degree 0 … degrees - 1 of unit vectors [n, 3], [n, degrees²], the
    2l + 1 of degree l at l² … (l + 1)² - 1.

    Normalised so that their products add up to a Legendre polynomial (the addition theorem):
    Σ_m y_lm(a) · y_lm(b) = P_l(a · b).
    """
    x, y, z = unit.unbind(1)
    one = torch.ones_like(z)
    cosine, sine = [one], [torch.zeros_like(z)]  # of m times the longitude, times sin(latitude)^m
    for _ in range(1, degrees):
        c, s = cosine[-1], sine[-1]
        cosine.append(x * c - y * s)
        sine.append(x * s + y * c)
    columns: list[list[Tensor]] = [[one] * (2 * l + 1) for l in range(degrees)]
    for m in range(degrees):
        before, legendre = torch.zeros_like(z), one * math.prod(range(1, 2 * m, 2))
        for l in range(m, degrees):
            scale = math.sqrt((2 if m else 1) * math.factorial(l - m) / math.factorial(l + m))
            columns[l][l + m] = scale * legendre * cosine[m]
            if m:
                columns[l][l - m] = scale * legendre * sine[m]
            after = ((2 * l + 1) * z * legendre - (l + m) * before) / (l - m + 1)
            before, legendre = legendre, after
    return torch.stack([c for row in columns for c in row], dim=1)


class SphericalBessel(nn.Module):
    """Orthonormal waves in a ball of radius 1: N_ln · j_l(z_ln x), where z_ln is the n-th zero of
    the spherical Bessel function j_l, l = 0 … degrees - 1, n = 1 … roots."""

    zeros: Tensor
    scale: Tensor

    def __init__(self, degrees: int, roots: int) -> None:
        super().__init__()
        zeros, scale = _zeros(degrees, roots)
        self.register_buffer("zeros", torch.from_numpy(zeros), persistent=False)
        self.register_buffer("scale", torch.from_numpy(scale), persistent=False)

    def extra_repr(self) -> str:
        return "degrees={}, roots={}".format(*self.zeros.shape)

    def forward(self, x: Tensor) -> Tensor:
        """[n] in (0, 1] → [n, degrees, roots], in fp32 or wider."""
        # The recurrence upwards in l loses up to ten digits where x is small.
        argument = x.double()[:, None, None] * self.zeros.double()
        column = [torch.sin(argument[:, 0]) / argument[:, 0]]
        before, now = torch.cos(argument) / argument, torch.sin(argument) / argument
        for l in range(1, self.zeros.shape[0]):
            before, now = now, (2 * l - 1) / argument * now - before
            column.append(now[:, l])
        waves = torch.stack(column, dim=1) * self.scale.double()
        return waves.to(full_precision(x).dtype)


def _zeros(degrees: int, roots: int) -> tuple[np.ndarray, np.ndarray]:
    """The first zeros of j_0 … [degrees, roots] and what normalises the waves. Between two zeros of
    one function lies one zero of the next."""
    from scipy.optimize import brentq
    from scipy.special import spherical_jn

    rows = [np.pi * np.arange(1, roots + degrees)]
    for l in range(1, degrees):
        ends = itertools.pairwise(rows[-1])
        rows.append(np.array([brentq(lambda x, l=l: spherical_jn(l, x), a, b) for a, b in ends]))
    zeros = np.stack([row[:roots] for row in rows])
    next_degree = spherical_jn(np.arange(1, degrees + 1)[:, None], zeros)
    return zeros, math.sqrt(2) / np.abs(next_degree)
