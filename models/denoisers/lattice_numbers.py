"""Log-metric coordinates of packed lattices, as tensors.

They are those of datapipe/crystals/lattice.py, which has their definition; a test holds the two
together.
"""

from __future__ import annotations

import torch
from torch import Tensor

NATURAL_VOLUME = 20.0
"""Å³ per atom of the cube that is their origin."""
SPREAD = (0.2, *[0.3] * 5)
"""Their units."""


def _basis(like: Tensor) -> Tensor:
    """[6, 3, 3] orthonormal symmetric matrices, the volume's first."""
    out = torch.zeros(6, 3, 3, dtype=torch.float64)
    for matrix, diagonal in zip(out, ([1, 1, 1], [1, -1, 0], [1, 1, -2]), strict=False):
        values = torch.tensor(diagonal, dtype=torch.float64)
        matrix.diagonal().copy_(values / values.norm())
    for matrix, (i, j) in zip(out[3:], ((0, 1), (0, 2), (1, 2)), strict=True):
        matrix[i, j] = matrix[j, i] = 0.5**0.5
    return out.to(like.device)


def log_metric(lattice: Tensor, atoms: Tensor) -> Tensor:
    """[B, 6] of lattices [B, 3, 3] (rows in Å) with so many atoms [B]."""
    cells = lattice.double()
    values, vectors = torch.linalg.eigh(cells @ cells.mT)
    logs = 0.5 * values.clamp(min=1e-12).log() - _origin(atoms)[:, None]
    matrix = (vectors * logs[:, None]) @ vectors.mT
    numbers = torch.einsum("kij,bij->bk", _basis(cells), matrix)
    return (numbers / numbers.new_tensor(SPREAD)).to(lattice.dtype)


def from_log_metric(numbers: Tensor, atoms: Tensor) -> Tensor:
    """[B, 3, 3] rows in Å, in standard orientation, from [B, 6] and [B] atoms. Numbers beyond those
    of any cell are cut off, so that there is one for all."""
    wide = numbers.double().nan_to_num().clamp(-25, 25)
    wide = wide * wide.new_tensor(SPREAD)
    values, vectors = torch.linalg.eigh(torch.einsum("bk,kij->bij", wide, _basis(wide)))
    scale = torch.exp(2 * (values.clamp(-6, 6) + _origin(atoms)[:, None]))
    metric = (vectors * scale[:, None]) @ vectors.mT
    return torch.linalg.cholesky((metric + metric.mT) / 2).to(numbers.dtype)


def _origin(atoms: Tensor) -> Tensor:
    """[B] logarithms of the edge of a cube of natural volume."""
    return (atoms.double() * NATURAL_VOLUME).log() / 3


def gram(lattice: Tensor) -> Tensor:
    """[B, 9], the products of the rows of [B, 3, 3]."""
    return (lattice @ lattice.mT).flatten(1)
