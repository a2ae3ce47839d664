"""Numbers that describe a unit cell: its six lattice constants, and its log-metric coordinates."""

from __future__ import annotations

import numpy as np

NATURAL_VOLUME = 20.0
"""Å³ per atom of the cube that is the origin of the log-metric coordinates."""

SPREAD = 0.5
"""Log-metric coordinates are in units of this: then those of real cells have a spread of about
one."""

_ROW, _COLUMN = np.triu_indices(3)
_WEIGHT = np.where(_ROW == _COLUMN, 1.0, np.sqrt(2.0))


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
    if np.linalg.det(cosines) < 1e-4:  # flat, or the angles close no corner
        return None
    return np.linalg.cholesky(cosines * np.outer(lengths, lengths))


def log_metric(lattice: np.ndarray, atoms: int) -> np.ndarray:
    """Log-metric coordinates [6] of a cell with so many atoms.

    The symmetric matrix S = ½ log(L Lᵀ) knows the cell but not its orientation, and every symmetric
    S is a cell (DiffCSP++; Jiao et al., ICLR 2024). The coordinates are S minus that of a cube of
    natural volume, in an orthonormal basis of symmetric matrices, over the spread.
    """
    values, vectors = np.linalg.eigh(lattice @ lattice.T)
    matrix = (vectors * (0.5 * np.log(values) - _origin(atoms))) @ vectors.T
    return _WEIGHT * matrix[_ROW, _COLUMN] / SPREAD


def from_log_metric(coordinates: np.ndarray, atoms: int) -> np.ndarray:
    """Rows [3, 3] in Å, in standard orientation, of the cell with log-metric coordinates [6]."""
    matrix = np.empty((3, 3))
    matrix[_ROW, _COLUMN] = matrix[_COLUMN, _ROW] = SPREAD * coordinates / _WEIGHT
    values, vectors = np.linalg.eigh(matrix)
    metric = (vectors * np.exp(2 * (values + _origin(atoms)))) @ vectors.T
    return np.linalg.cholesky((metric + metric.T) / 2)


def _origin(atoms: int) -> float:
    """Logarithm of the edge of a cube of natural volume."""
    return float(np.log(atoms * NATURAL_VOLUME) / 3)
