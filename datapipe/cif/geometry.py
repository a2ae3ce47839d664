"""What the atoms themselves say: copies, shortest distances, symmetry, whether two cells agree."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from ase.data import covalent_radii

from crysforge.datapipe.cif.cell import fits
from crysforge.datapipe.cif.groups.symbols import Setting
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal

_GRID = 10_000
_SAME = 0.01
"""Å between two atoms that are one."""
_IMPOSSIBLE, _USUAL = 0.5, 0.75
"""Shares of the sum of covalent radii: no two atoms come closer than the first, and none in a
crystal at rest closer than the second."""
_OVERLAP = 0.5
"""Å between two atoms that cannot both be there."""
_MOST_ATOMS = 500
"""Atoms of the largest cell in which all distances are looked at."""
_MOST_MAPPED = 200
"""Atoms of the largest cell that is held against its images under a group."""
_TOLERANCES = (0.01, 0.05, 0.1, 0.3)
"""Å, for the search of a symmetry that a file names."""

_IMAGES = np.array(list(itertools.product((-1, 0, 1), repeat=3)), dtype=float)


def merge_copies(
    index: np.ndarray, numbers: np.ndarray, frac: np.ndarray, cell: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Leaves out atoms that are listed again, as where a file has all atoms of the cell and its
    operations too; says last whether there were any.

    Raises:
        BadCrystal: two elements in one place.
    """
    key = np.rint(frac * _GRID).astype(np.int64) % _GRID @ np.array([_GRID**2, _GRID, 1])
    if len(set(key.tolist())) == len(key):
        return index, numbers, frac, False
    _, first, where = np.unique(key, return_index=True, return_inverse=True)
    gap = frac - frac[first[where]]
    gap -= np.rint(gap)
    close = np.square(gap @ cell).sum(-1) < _SAME**2
    if (numbers != numbers[first[where]])[close].any():
        raise BadCrystal("the CIF puts two elements in one place", "partial occupancy")
    keep = ~close
    keep[first] = True
    return index[keep], numbers[keep], frac[keep], True


def same_crystal(a: Crystal, b: Crystal) -> bool:
    """Whether two crystals in one cell have the same atoms at the same distances."""
    if not np.array_equal(a.numbers, b.numbers) or not np.allclose(a.lattice, b.lattice):
        return False
    if len(a) > _MOST_ATOMS:
        return False
    first, second = (_sorted_distances(c) for c in (a, b))
    return bool(np.allclose(first, second, atol=2e-3))


def shortest_distances(crystal: Crystal) -> str:
    """Whether the atoms of a crystal are "usual" distances apart, some are "impossible" ones or
    "overlap", or it is "open"."""
    if len(crystal) > _MOST_ATOMS:
        return "open"
    radii = covalent_radii[crystal.numbers]
    distances = nearest_distances(crystal)
    if distances.min() < _OVERLAP:
        return "overlap"
    least = float((distances / (radii[:, None] + radii)).min())
    return "usual" if least > _USUAL else "impossible" if least < _IMPOSSIBLE else "open"


def impossible_pair(crystal: Crystal) -> tuple[int, int, float] | None:
    """Two atoms that are closer than any such atoms come, and their distance in Å; None if there
    are none, or if they overlap, which filters say of any crystal."""
    if len(crystal) > _MOST_ATOMS:
        return None
    gap = crystal.frac_coords[:, None] - crystal.frac_coords
    gap -= np.rint(gap)
    square = squares(gap, crystal.lattice)
    radii = _IMPOSSIBLE * covalent_radii[crystal.numbers]
    least = radii[:, None] + radii
    near = square < least * least
    if np.count_nonzero(near) == len(crystal):  # each to itself
        return None
    np.fill_diagonal(square, np.inf)
    i, j = np.unravel_index(np.where(near, square, np.inf).argmin(), square.shape)
    distance = float(np.sqrt(square[i, j]))
    return (int(i), int(j), distance) if distance >= _OVERLAP else None


def has_symmetry(crystal: Crystal, number: int, settings: tuple[Setting, ...]) -> bool:
    """Whether the atoms have the symmetry that a file names: the group maps them onto themselves,
    or a search finds a group of that type."""
    if len(crystal) <= _MOST_MAPPED and any(_is_closed(crystal, s) for s in settings):
        return True
    import spglib

    cell: Any = crystal.lattice, crystal.frac_coords, crystal.numbers
    for tolerance in _TOLERANCES:
        try:
            found = spglib.get_symmetry_dataset(cell, symprec=tolerance, angle_tolerance=5)
        except getattr(spglib, "SpglibError", ()):
            continue
        if found is not None and found.number == number:
            return True
    return False


def _is_closed(crystal: Crystal, setting: Setting) -> bool:
    group = setting.group
    if not fits(crystal.lattice, group):
        return False
    for rotation, shift in zip(group.rotations, group.translations, strict=True):
        moved = crystal.frac_coords @ rotation.T + shift
        gap = moved[:, None] - crystal.frac_coords
        gap -= np.rint(gap)
        hit = np.square(gap @ crystal.lattice).sum(-1) < _TOLERANCES[-1] ** 2
        hit &= crystal.numbers[:, None] == crystal.numbers
        if not hit.any(1).all():
            return False
    return True


def squares(gap: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """[n, m] squared lengths in Å² of differences [n, m, 3] of fractional coordinates."""
    vectors = gap.reshape(-1, 3) @ cell
    return np.einsum("ix,ix->i", vectors, vectors).reshape(gap.shape[:-1])


def nearest_distances(crystal: Crystal) -> np.ndarray:
    """[n, n] Å from each atom to the nearest image of each; of itself, to its nearest copy."""
    n = len(crystal)
    out = np.empty((n, n))
    shifts = _IMAGES @ crystal.lattice
    for i in range(n):
        gap = crystal.frac_coords - crystal.frac_coords[i]
        gap -= np.rint(gap)
        square = np.square((gap @ crystal.lattice)[:, None] + shifts).sum(-1)
        square[i, len(shifts) // 2] = np.inf
        out[i] = np.sqrt(square.min(1))
    return out


def _sorted_distances(crystal: Crystal) -> np.ndarray:
    """All distances, sorted within each pair of elements."""
    distances = nearest_distances(crystal)
    places = [np.flatnonzero(crystal.numbers == z) for z in np.unique(crystal.numbers)]
    return np.concatenate(
        [np.sort(distances[np.ix_(a, b)].ravel()) for a in places for b in places]
    )
