"""StructureMatcher's distance between two crystals, on arrays, with the same answers.

pymatgen tries every cell of one lattice that is like the other's and every shift that puts an atom
on the other's rarest kind. Here each crystal is reduced once rather than once a pair, the cells and
shifts that cannot fit are found for all at once, and pymatgen's own functions measure the others.

Letters: n atoms, m cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pymatgen.util.coord_cython import pbc_shortest_vectors
from scipy.optimize import linear_sum_assignment

from crysforge.datapipe.preparing.duplicates.matcher import Reduced, similar_cells

_AT_ONCE = 200_000
"""Pairs of atoms that are looked at together, over cells and shifts."""
_EXACT = 1e-5
"""Distance at which pymatgen looks no further."""


@dataclass(frozen=True)
class Tolerances:
    """What StructureMatcher calls `stol`, `ltol` and `angle_tol`."""

    stol: float = 0.5
    """Largest root mean square displacement, in units of (volume/atom)^(1/3)."""
    ltol: float = 0.3
    """Largest relative difference of a cell length, at equal volume."""
    angle_tol: float = 10.0
    """Largest difference of a cell angle in degrees."""

    def __str__(self) -> str:
        return f"stol {self.stol:g}, ltol {self.ltol:g}, angle {self.angle_tol:g}°"


CSP = Tolerances()
"""Of the papers on structure prediction."""
DEFAULT = Tolerances(0.3, 0.2, 5.0)
"""pymatgen's own."""


def distance(made: Reduced, known: Reduced, tolerances: Tolerances = CSP) -> float | None:
    """What `StructureMatcher.get_rms_dist(made, known)[0]` is: the least root mean square
    displacement over (volume/atom)^(1/3); None where they do not match."""
    if made.counts != known.counts:
        return None
    mask = (known.numbers[:, None] != made.numbers[None]).astype(np.int64)
    averages: dict[tuple[float, ...], _Average] = {}
    best = math.inf
    for constants, sites, shift in _ways(made, known, tolerances):
        key = tuple(np.round(constants, 9))  # symmetric crystals have few that differ
        if key not in averages:
            averages[key] = _Average(constants, len(sites), tolerances.stol)
        best = min(best, averages[key].measure(known.frac_coords + shift, sites, mask))
        if best < _EXACT:
            break
    return best if best < tolerances.stol else None


def _ways(
    made: Reduced, known: Reduced, tolerances: Tolerances
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ways to lay the known crystal over the made one that bring every atom near one of its kind:
    lengths and angles [6] of the mean cell, the made crystal's fractional coordinates there [n, 3],
    and the shift of the known one [3]."""
    angle = math.radians(tolerances.angle_tol)
    basis = similar_cells(made.cell, known.cell, tolerances.ltol, angle)
    cells = basis @ made.cell
    keep = _alike(cells, known.cell, tolerances)
    basis, cells = basis[keep], cells[keep]
    if not len(cells):
        return
    means, near = _near(cells, known.cell, len(made.numbers), tolerances.stol)
    every = made.frac_coords @ np.linalg.inv(basis)
    every -= np.floor(every)
    starts = made.numbers == known.numbers[known.anchor]
    alike = known.numbers[:, None] == made.numbers[None]
    block = max(1, _AT_ONCE // (int(starts.sum()) * len(made.numbers) ** 2))
    for first in range(0, len(every), block):
        part = slice(first, first + block)
        sites, tolerance = every[part], near[part][:, None, None, None]
        shifts = sites[:, starts] - known.frac_coords[known.anchor]  # [m, s, 3]
        away = known.frac_coords[:, None] + shifts[:, :, None, None] - sites[:, None, None]
        away -= np.rint(away)
        meets = (np.abs(away) <= tolerance).all(-1) & alike  # [m, s, n, n]
        for cell, shift in np.argwhere(meets.any(3).all(2)):
            yield means[first + cell], sites[cell], shifts[cell, shift]


def _alike(cells: np.ndarray, cell: np.ndarray, tolerances: Tolerances) -> np.ndarray:
    """[m] whether cells have the lengths and angles of another within the tolerances."""
    lengths, angles = _constants(cells @ cells.transpose(0, 2, 1))
    right_lengths, right_angles = _constants(cell @ cell.T)
    ratio = lengths / right_lengths
    alike = (ratio < 1 + tolerances.ltol) & (ratio > 1 / (1 + tolerances.ltol))
    close = np.abs(np.degrees(angles - right_angles)) < tolerances.angle_tol
    return np.asarray((alike & close).all(1))


def _constants(metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and angles (α, β, γ in radians), [..., 3] each."""
    lengths = np.sqrt(np.diagonal(metric, axis1=-2, axis2=-1))
    pairs = np.array([[1, 2], [0, 2], [0, 1]])
    products = metric[..., pairs[:, 0], pairs[:, 1]]
    cosines = products / lengths[..., pairs[:, 0]] / lengths[..., pairs[:, 1]]
    return lengths, np.arccos(np.clip(cosines, -1, 1))


def _near(
    cells: np.ndarray, cell: np.ndarray, atoms: int, stol: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and angles [m, 6] (degrees) of the mean of cells and another, and the largest
    difference of fractional coordinates there of atoms that may be paired [m, 3]."""
    lengths, angles = (
        (a + b) / 2
        for a, b in zip(
            _constants(cells @ cells.transpose(0, 2, 1)), _constants(cell @ cell.T), strict=True
        )
    )
    cosines = np.repeat(np.eye(3)[None], len(cells), 0)
    for number, (i, j) in enumerate(((1, 2), (0, 2), (0, 1))):
        cosines[:, i, j] = cosines[:, j, i] = np.cos(angles[:, number])
    metric = cosines * lengths[:, :, None] * lengths[:, None]
    volume = np.sqrt(np.maximum(np.linalg.det(metric), 1e-12))
    steep = np.sqrt(np.abs(np.diagonal(np.linalg.inv(metric), axis1=1, axis2=2)))
    near = 2 * stol * steep * np.cbrt(volume / atoms)[:, None]
    return np.concatenate([lengths, np.degrees(angles)], axis=1), near


class _Average:
    """The mean of two cells, in which distances are measured. It is what pymatgen's search for
    shortest vectors asks of a lattice, with everything made once."""

    pbc = (True, True, True)

    def __init__(self, constants: np.ndarray, atoms: int, stol: float) -> None:
        from pymatgen.core import Lattice

        lattice = Lattice.from_parameters(*constants)
        self.lll_matrix = np.array(lattice.lll_matrix)
        self._inverse = np.array(lattice.lll_inverse)
        self.size = (atoms / abs(float(np.linalg.det(self.lll_matrix)))) ** (1 / 3)
        steep = np.linalg.norm(np.linalg.inv(self.lll_matrix), axis=0)
        self.near = 2 * steep * stol / self.size

    def get_lll_frac_coords(self, frac_coords: np.ndarray) -> np.ndarray:
        """[n, 3] in the reduced basis."""
        return np.asarray(frac_coords @ self._inverse)

    def measure(self, moved: np.ndarray, sites: np.ndarray, mask: np.ndarray) -> float:
        """Root mean square of the displacements of the cheapest pairing, without their mean, over
        (volume/atom)^(1/3)."""
        vectors, square = pbc_shortest_vectors(
            self, moved, sites, mask, return_d2=True, lll_frac_tol=self.near
        )
        chosen = vectors[linear_sum_assignment(square)]
        left = chosen - chosen.sum(0) / len(chosen)
        return math.sqrt((left * left).sum() / len(left)) * self.size
