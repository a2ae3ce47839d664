"""Cell vectors of a CIF, and whether a space group fits them."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from gemmi import cif

from crysforge.datapipe.cif.blocks import Block
from crysforge.datapipe.cif.groups.operations import SymmetryGroup
from crysforge.datapipe.crystals.crystal import BadCrystal

_LENGTHS = ("_cell_length_a", "_cell_length_b", "_cell_length_c")
_ANGLES = ("_cell_angle_alpha", "_cell_angle_beta", "_cell_angle_gamma")

_MISFIT = 0.015
"""How far elements of the metric may be from those that a group makes of them: lengths that ought
to be equal by 1.5 % of each other, right angles by 0.9°."""

Parameters = tuple[list[float], list[float | None]]
"""Lengths in Å and angles in degrees; None where the file has no angle."""


def read_parameters(block: Block) -> Parameters:
    """Lengths and angles of the cell.

    Raises:
        BadCrystal: a length is missing, or a value is no positive number.
    """
    lengths = [_number(block, tag) for tag in _LENGTHS]
    missing = [tag for tag, value in zip(_LENGTHS, lengths, strict=True) if value is None]
    if missing:
        raise BadCrystal(f"the CIF has no {', '.join(missing)}", "no cell")
    return [x for x in lengths if x is not None], [_number(block, tag) for tag in _ANGLES]


def _number(block: Block, tag: str) -> float | None:
    text = block.value(tag)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = cif.as_number(text)
    if not 0 < value < 1e5:
        raise BadCrystal(f"{tag} is {text!r}: not a positive number")
    return value


def lattice_for(parameters: Parameters, group: SymmetryGroup) -> np.ndarray | None:
    """[3, 3] cell vectors in Å; angles that the file lacks are those that the group forces. None if
    the group does not fit the cell.

    Raises:
        BadCrystal: the group leaves a missing angle open.
    """
    lengths, angles = parameters
    forced: tuple[float | None, ...] = ()
    if None in angles:
        forced = forced_angles(group)
        angles = [f if a is None else a for a, f in zip(angles, forced, strict=True)]
    cell = lattice(lengths, [_ANY if a is None else a for a in angles])
    if not fits(cell, group):
        return None
    if None in angles:
        missing = [t for t, a in zip(_ANGLES, angles, strict=True) if a is None]
        raise BadCrystal(f"the CIF has no {', '.join(missing)}, nor does its symmetry force them")
    return cell


_ANY = 80.0
"""An angle in degrees that no group forces, in place of a missing one."""


def lattice(lengths: list[float], angles: list[float]) -> np.ndarray:
    """[3, 3] cell vectors in Å from lengths in Å and angles in degrees.

    Raises:
        BadCrystal: no cell has these angles.
    """
    a, b, c = lengths
    radians = np.radians(angles)
    cos, sin = np.cos(radians).tolist(), np.sin(radians).tolist()
    x = cos[2]
    y = sin[2]
    if abs(y) < 1e-6:
        raise BadCrystal(f"the cell is flat: gamma is {angles[2]} degrees")
    z1 = cos[1]
    z2 = (cos[0] - cos[1] * cos[2]) / y
    height = 1 - z1**2 - z2**2
    if height <= 0:
        raise BadCrystal(f"no cell has the angles {angles}")
    return np.array([[a, 0.0, 0.0], [b * x, b * y, 0.0], [c * z1, c * z2, c * math.sqrt(height)]])


def fits(cell: np.ndarray, group: SymmetryGroup) -> bool:
    """Whether the rotations of a group map the cell onto itself."""
    return misfit(cell, group) <= _MISFIT


def misfit(cell: np.ndarray, group: SymmetryGroup) -> float:
    """How far the cell is from one that the rotations of a group map onto itself: the largest
    difference of an element of its metric, as a share of the lengths."""
    if len(group) == 1:
        return 0.0
    metric = (cell @ cell.T).ravel()
    change = (group.mean_metric @ metric - metric).tolist()
    size = [math.sqrt(metric[i]) for i in (0, 4, 8)]
    return max(abs(change[3 * i + j]) / (size[i] * size[j]) for i in range(3) for j in range(i, 3))


@lru_cache(maxsize=512)
def forced_angles(group: SymmetryGroup) -> tuple[float | None, float | None, float | None]:
    """Angles in degrees that any cell of a group has; None for one that is free."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2):
        shape = rng.random((3, 3)) + np.eye(3)
        metric = (group.mean_metric @ (shape @ shape.T).ravel()).reshape(3, 3)
        size = np.sqrt(np.diag(metric))
        cosines = metric / np.outer(size, size)
        found.append(np.degrees(np.arccos([cosines[1, 2], cosines[0, 2], cosines[0, 1]])))
    same = np.abs(found[0] - found[1]) < 1e-6
    a, b, c = (round(float(x)) if s else None for x, s in zip(found[0], same, strict=True))
    return a, b, c
