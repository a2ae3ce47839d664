"""When two crystals are the same: pymatgen's StructureMatcher, asked only where it could say yes.

The matcher brings both crystals to primitive Niggli cells of equal volume. It then tries every cell
of the first lattice that is like the cell of the second, and every shift that puts an atom of the
first on one of the second; where all atoms come near enough to each other it measures. Here each
crystal is reduced once rather than once a pair, which changes nothing, and `Matcher.may_fit` looks
for such a cell and shift on arrays, with the matcher's own tolerances and a little more. Where
there is none the matcher finds none either, so no match is lost.

Letters: n atoms, m cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.lattice import reduction

_MARGIN = 1.001
"""Tolerances of `may_fit` over those of the matcher: far more than rounding."""

MAX_ATOMS = 400
"""Atoms of the largest crystal that is compared; pymatgen takes over a minute to reduce one."""

_MOST_STEPS = 500_000
"""Lattice vectors that may be looked at for a cell."""

_AT_ONCE = 200_000
"""Pairs of atoms that are looked at together, over all cells."""


@dataclass(frozen=True)
class Match:
    """How nearly two crystals are the same."""

    rms: float | None
    """Root mean square displacement of the atoms over (volume/atom)^(1/3)."""
    largest: float | None
    """Largest displacement over (volume/atom)^(1/3), in the alignment of least rms."""


class Reduced:
    """A crystal in its primitive Niggli cell, as the matcher makes it.

    Attributes:
        item, id: what the caller knows the crystal by.
        structure: the reduced pymatgen `Structure`.
        counts: (atomic number, atoms) of the cell, ascending.
        numbers: [n] atomic numbers. frac_coords: [n, 3].
        cell: [3, 3] rows, at a volume of one.
        likeness: [4], logarithms of the sorted edges of `cell` and of (volume/atom)^(1/3) in Å.
        anchor: the first atom of the rarest kind, whose place the matcher tries.

    Args:
        most: atoms of the largest crystal to reduce; the work grows with more than their cube.

    Raises:
        ValueError: it has more, its cell is too long to be compared, or pymatgen cannot reduce it.
    """

    def __init__(self, crystal: Crystal, item: int, most: int = MAX_ATOMS) -> None:
        self.item, self.id = item, crystal.id
        if len(crystal) > most:
            raise ValueError(f"it has {len(crystal)} atoms, more than duplicates.max_atoms={most}")
        basis = reduction(crystal.lattice) @ crystal.lattice
        width, length = np.linalg.norm(basis[0]), np.linalg.norm(basis[2])
        if math.prod(2 * _reach(basis, float(length)) + 1) > _MOST_STEPS:
            raise ValueError(f"its cell is {length / width:.3g} times as long as wide: too much")
        structure = crystal.to_pymatgen()
        self.structure: Any = structure.get_reduced_structure("niggli").get_primitive_structure()
        self.numbers = np.array(self.structure.atomic_numbers)
        self.frac_coords = np.array(self.structure.frac_coords)
        elements, place, atoms = np.unique(self.numbers, return_inverse=True, return_counts=True)
        self.counts = tuple(zip(elements.tolist(), atoms.tolist(), strict=True))
        self.anchor = int(np.argmin(atoms[place]))
        size = self.structure.volume ** (1 / 3)
        self.cell = self.structure.lattice.matrix / size
        edges = np.sort(np.linalg.norm(self.cell, axis=1))
        self.likeness = np.log([*edges, size / len(self.numbers) ** (1 / 3)])


class Group:
    """Crystals with equal `counts`, that others are compared with; they can be added one by one."""

    def __init__(self) -> None:
        self._members: list[Reduced] = []
        self._likeness: np.ndarray = np.empty((4, 4))

    def __len__(self) -> int:
        return len(self._members)

    def add(self, crystal: Reduced) -> None:
        if len(self) == len(self._likeness):
            self._likeness = np.concatenate([self._likeness, np.empty_like(self._likeness)])
        self._likeness[len(self)] = crystal.likeness
        self._members.append(crystal)

    def nearest(self, crystal: Reduced) -> list[Reduced]:
        """The members, those with the most similar cell and density first."""
        distance = np.abs(self._likeness[: len(self)] - crystal.likeness).sum(axis=1)
        return [self._members[i] for i in distance.argsort(kind="stable")]


@dataclass(frozen=True)
class Matcher:
    """StructureMatcher for primitive cells at equal volume; `Duplicates` says what the tolerances
    mean."""

    stol: float = 0.1
    angle_tol: float = 10.0
    ltol: float = 0.3

    @cached_property
    def _matcher(self) -> Any:
        from pymatgen.analysis.structure_matcher import StructureMatcher

        return StructureMatcher(stol=self.stol, angle_tol=self.angle_tol, ltol=self.ltol)

    def fits(self, known: Reduced, new: Reduced) -> bool:
        """Whether StructureMatcher takes them for the same. It is not quite symmetric: the known
        crystal is its first argument, as in its `group_structures`."""
        return bool(
            self._matcher.fit(known.structure, new.structure, skip_structure_reduction=True)
        )

    def measure(self, known: Reduced, new: Reduced) -> Match:
        """How far the atoms of two crystals are apart; unknown where they do not fit."""
        try:
            found = self._matcher.get_rms_dist(known.structure, new.structure)
        except Exception:  # that they are the same is known already; this is for the record
            found = None
        return Match(None, None) if found is None else Match(float(found[0]), float(found[1]))

    def may_fit(self, known: Reduced, new: Reduced) -> bool:
        """False only where `fits` is."""
        if known.counts != new.counts:  # the matcher pairs atoms one to one, like with like
            return False
        basis = similar_cells(known.cell, new.cell, self.ltol, math.radians(self.angle_tol))
        if not len(basis):
            return False
        middle = _mean_metric(basis @ known.cell, new.cell)
        volume = np.sqrt(np.maximum(np.linalg.det(middle), 0))
        if volume.min() < 1e-3:  # flat: leave it to the matcher
            return True
        # In each direction an atom may be off by twice stol, since the anchor may be off by once.
        spacing = 1 / np.sqrt(np.diagonal(np.linalg.inv(middle), axis1=1, axis2=2))
        length = np.cbrt(volume / len(new.numbers))[:, None]
        tolerance = _MARGIN * 2 * self.stol * length / spacing
        change = np.linalg.inv(basis)
        step = max(1, _AT_ONCE // len(new.numbers) ** 2)
        return any(
            _atoms_meet(known, new, change[start : start + step], tolerance[start : start + step])
            for start in range(0, len(basis), step)
        )


def similar_cells(lattice: np.ndarray, cell: np.ndarray, ltol: float, atol: float) -> np.ndarray:
    """[m, 3, 3], all integer matrices of determinant ±1 that make of a lattice a cell with the
    lengths (relative) and angles (radians) of another, within tolerance."""
    lengths = np.linalg.norm(cell, axis=1)
    factor = _MARGIN * (1 + ltol)
    reach = _reach(lattice, factor * lengths.max())
    steps = np.stack(
        np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    vectors = steps @ lattice
    norms = np.linalg.norm(vectors, axis=1)
    edges = [np.flatnonzero((norms < factor * x) & (norms * factor > x)) for x in lengths]

    def angle_fits(i: int, j: int) -> np.ndarray:
        products = vectors[edges[i]] @ vectors[edges[j]].T
        cosines = products / norms[edges[i]][:, None] / norms[edges[j]]
        right = math.acos(cell[i] @ cell[j] / lengths[i] / lengths[j])
        return np.abs(np.arccos(np.clip(cosines, -1, 1)) - right) < _MARGIN * atol

    pairs = np.argwhere(angle_fits(0, 1))
    which, third = np.nonzero(angle_fits(0, 2)[pairs[:, 0]] & angle_fits(1, 2)[pairs[:, 1]])
    chosen = [edges[0][pairs[which, 0]], edges[1][pairs[which, 1]], edges[2][third]]
    basis = steps[np.stack(chosen, axis=1)]
    return basis[np.abs(np.abs(np.linalg.det(basis)) - 1) < 0.5]


def _reach(lattice: np.ndarray, length: float) -> np.ndarray:
    """[3] most lattice steps along each axis of a vector that is no longer: one of length r has at
    most r / d planes of spacing d between its ends."""
    return np.floor(length * np.linalg.norm(np.linalg.inv(lattice), axis=0))


def _mean_metric(cells: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """[m, 3, 3], metrics of the cells whose lengths and angles are the mean of two cells'."""

    def constants(metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.sqrt(np.diagonal(metric, axis1=-2, axis2=-1))
        cosines = metric / lengths[..., :, None] / lengths[..., None, :]
        return lengths, np.arccos(np.clip(cosines, -1, 1))

    one, other = constants(cells @ cells.transpose(0, 2, 1)), constants(cell @ cell.T)
    lengths, angles = ((a + b) / 2 for a, b in zip(one, other, strict=True))
    return np.cos(angles) * lengths[:, :, None] * lengths[:, None, :]


def _atoms_meet(known: Reduced, new: Reduced, change: np.ndarray, tolerance: np.ndarray) -> bool:
    """Whether in some cell a shift that puts an atom of the known crystal on the new one's anchor
    brings an atom of the known one, of the same kind, near every atom of the new one.

    Args:
        change: [m, 3, 3], from fractional coordinates of the known crystal to those in each cell.
        tolerance: [m, 3], how far apart in each fractional coordinate is near.
    """
    sites = known.frac_coords @ change  # [m, n, 3]
    kind = new.numbers[new.anchor]
    shifts = sites[:, known.numbers == kind] - new.frac_coords[new.anchor]
    cell = np.repeat(np.arange(len(sites)), shifts.shape[1])
    shifts = shifts.reshape(-1, 3)  # what is left of all cells and shifts
    rarity = dict(new.counts)
    others = (i for i in range(len(new.numbers)) if i != new.anchor)
    for atom in sorted(others, key=lambda i: rarity[new.numbers[i]]):
        alike = sites[:, known.numbers == new.numbers[atom]]
        away = alike[cell] - (new.frac_coords[atom] + shifts)[:, None]
        away -= np.rint(away)
        x, y, z = np.moveaxis(np.abs(away) < tolerance[cell][:, None], 2, 0)
        near = (x & y & z).any(axis=1)
        cell, shifts = cell[near], shifts[near]
        if not len(cell):
            return False
    return True
