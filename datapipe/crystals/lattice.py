"""Numbers that describe a unit cell: its six lattice constants, and its log-metric coordinates."""

from __future__ import annotations

import itertools

import numpy as np

NATURAL_VOLUME = 20.0
"""Å³ per atom of the cube that is the origin of the log-metric coordinates."""


def _basis() -> np.ndarray:
    """[6, 3, 3] orthonormal symmetric matrices: of the volume first, then those of the shape."""
    out = np.zeros((6, 3, 3))
    for matrix, diagonal in zip(out, ([1, 1, 1], [1, -1, 0], [1, 1, -2]), strict=False):
        np.fill_diagonal(matrix, np.array(diagonal) / np.linalg.norm(diagonal))
    for matrix, (i, j) in zip(out[3:], ((0, 1), (0, 2), (1, 2)), strict=True):
        matrix[i, j] = matrix[j, i] = 0.5**0.5
    return out


_BASIS = _basis()
_SPREAD = np.array([0.2, *[0.3] * 5])
"""Units of the coordinates: about the standard deviations over Materials Project crystals."""


def lattice_constants(lattice: np.ndarray) -> np.ndarray:
    """[6]: lengths a, b, c in Å and angles α, β, γ in degrees, of rows [3, 3]."""
    lengths = np.linalg.norm(lattice, axis=1)
    unit = lattice / lengths[:, None]
    cosines = [unit[1] @ unit[2], unit[0] @ unit[2], unit[0] @ unit[1]]
    return np.concatenate([lengths, np.degrees(np.arccos(np.clip(cosines, -1, 1)))])


def standard_lattice(constants: np.ndarray) -> np.ndarray | None:
    """Rows [3, 3] in Å in standard orientation from the lattice constants [6]; None if no cell has
    them."""
    if (constants <= 0).any() or (constants[3:] >= 180).any():
        return None
    lengths, (alpha, beta, gamma) = constants[:3], np.cos(np.radians(constants[3:]))
    cosines = np.array([[1, gamma, beta], [gamma, 1, alpha], [beta, alpha, 1]])
    if np.linalg.det(cosines) < 1e-6:  # flat, or the angles close no corner
        return None
    return np.linalg.cholesky(cosines * np.outer(lengths, lengths))


def log_metric(lattice: np.ndarray, atoms: int) -> np.ndarray:
    """Log-metric coordinates [6] of a cell with so many atoms.

    The symmetric matrix S = ½ log(L Lᵀ) knows the cell but not its orientation, and every symmetric
    S is a cell (DiffCSP++; Jiao et al., ICLR 2024). The coordinates are S minus that of a cube of
    natural volume, in an orthonormal basis of symmetric matrices whose first one is the volume's,
    in units in which the coordinates of real crystals have a spread of about one.
    """
    values, vectors = np.linalg.eigh(lattice @ lattice.T)
    matrix = (vectors * (0.5 * np.log(values) - _origin(atoms))) @ vectors.T
    return np.einsum("kij,ij->k", _BASIS, matrix) / _SPREAD


def from_log_metric(coordinates: np.ndarray, atoms: int) -> np.ndarray:
    """Rows [3, 3] in Å, in standard orientation, of the cell with log-metric coordinates [6]."""
    values, vectors = np.linalg.eigh(np.einsum("k,kij->ij", _SPREAD * coordinates, _BASIS))
    metric = (vectors * np.exp(2 * (values + _origin(atoms)))) @ vectors.T
    return np.linalg.cholesky((metric + metric.T) / 2)


def _origin(atoms: int) -> float:
    """Logarithm of the edge of a cube of natural volume."""
    return float(np.log(atoms * NATURAL_VOLUME) / 3)


def reduction(lattice: np.ndarray) -> np.ndarray:
    """[3, 3] integers of determinant ±1; times the lattice (rows, Å) they are its Minkowski-reduced
    basis, shortest vector first, by the greedy algorithm of Nguyen and Stehlé (ACM Trans.
    Algorithms 5, 46, 2009).

    In such a basis every lattice vector that is no longer than the third one has coefficients
    between -1 and 1 along it, and the planes are as far apart as they can be: a search over images
    is as short as the lattice allows, however skewed the cell was.
    """
    change = np.eye(3, dtype=np.int64)
    while True:
        change = _pair_reduced(_by_length(change, lattice), lattice)
        change = _by_length(change, lattice)
        basis = change @ lattice
        place = np.linalg.solve(basis[:2] @ basis[:2].T, basis[:2] @ basis[2])
        near = np.floor(place).astype(np.int64) + _CORNERS
        left = basis[2] - near @ basis[:2]
        best = int((left**2).sum(axis=1).argmin())
        if not (left[best] @ left[best]) < (1 - 1e-9) * (basis[2] @ basis[2]):
            return change
        change[2] -= near[best] @ change[:2]


_CORNERS = np.array(list(itertools.product((-1, 0, 1, 2), repeat=2)))
"""[16, 2] steps from the floor of a point to the lattice points of a plane around it."""


def _by_length(change: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    return change[np.argsort(((change @ lattice) ** 2).sum(axis=1), kind="stable")]


def _pair_reduced(change: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """The basis with its first two vectors reduced (Lagrange)."""
    change = change.copy()
    while True:
        first, second = change[:2] @ lattice
        steps = int(np.rint(first @ second / (first @ first)))
        if steps == 0:
            return change
        change[1] -= steps * change[0]
        after = change[1] @ lattice
        if not (after @ after) < (1 - 1e-9) * (second @ second):
            change[1] += steps * change[0]
            return change
        if after @ after < first @ first:
            change[[0, 1]] = change[[1, 0]]
