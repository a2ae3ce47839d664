"""The record for one crystal: upstream produces it, downstream consumes it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

MAX_Z = 118
"""Largest atomic number."""


MAX_LABEL = 1e30
"""Largest label: its square is finite, and its sum over a data set in single precision."""


class BadCrystal(ValueError):
    """A structure that cannot be used; the message says why in one line, `reason` in a word or two
    that counts are kept under."""

    def __init__(self, message: str, reason: str = "unusable structure") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Crystal:
    """One periodic crystal with full occupancy.

    Attributes:
        id: unique within a data set.
        numbers: [n] uint8, atomic numbers 1..118.
        frac_coords: [n, 3] float64 in [0, 1).
        lattice: [3, 3] float64, rows a, b, c in Å, in standard orientation (a along x, b in the
            xy plane, right-handed).
        targets: label values in physical units; a missing label is absent or NaN.
        notes: what its reader had to guess or found to be odd, a line each; not stored.
        copies: how many of these cells the one that was given holds; 1 unless it was reduced.

    Build one with `Crystal.create`, which checks and normalises.
    """

    id: str
    numbers: np.ndarray
    frac_coords: np.ndarray
    lattice: np.ndarray
    targets: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    copies: int = 1

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def create(
        cls,
        id: str,
        numbers: Any,
        frac_coords: Any,
        lattice: Any,
        targets: Mapping[str, float] | None = None,
    ) -> Crystal:
        """Checks the input, wraps coordinates into [0, 1), turns the cell to standard orientation.

        Args:
            numbers: [n] atomic numbers. frac_coords: [n, 3]. lattice: [3, 3] rows in Å, in any
                orientation or handedness.

        Raises:
            BadCrystal: no atoms, unknown element, wrong shapes, non-finite values, flat cell.
        """
        z = np.asarray(numbers)
        frac = np.asarray(frac_coords, dtype=np.float64)
        cell = np.asarray(lattice, dtype=np.float64)
        if z.ndim != 1 or len(z) == 0:
            raise BadCrystal("the crystal has no atoms")
        if frac.shape != (len(z), 3) or cell.shape != (3, 3):
            raise BadCrystal(
                f"{len(z)} atoms need coordinates [{len(z)}, 3] and a lattice [3, 3], "
                f"got {list(frac.shape)} and {list(cell.shape)}"
            )
        if not (np.isfinite(frac).all() and np.isfinite(cell).all()):
            raise BadCrystal("coordinates or lattice are not finite numbers")
        if len(unknown := z[(z < 1) | (z > MAX_Z)]):
            raise BadCrystal(
                f"unknown element: atomic numbers must be 1..{MAX_Z}, got {unknown[:5].tolist()}",
                "unknown element",
            )
        volume = _volume(cell.tolist())
        if abs(volume) < 1e-3:
            raise BadCrystal(f"the cell is flat: volume {abs(volume):.2g} Å³")
        if volume < 0:  # the inverted basis spans the same crystal with the right hand
            cell, frac = -cell, -frac
        return cls(
            id=str(id),
            numbers=z.astype(np.uint8),
            frac_coords=wrap(frac),
            lattice=in_standard_orientation(cell, abs(volume)),
            targets=dict(targets or {}),
        )

    def with_targets(self, targets: Mapping[str, float]) -> Crystal:
        """The same crystal with other labels."""
        return replace(self, targets=dict(targets))

    @property
    def volume(self) -> float:
        """Cell volume in Å³."""
        return float(abs(np.linalg.det(self.lattice)))

    @classmethod
    def from_pymatgen(cls, structure: Any, id: str = "", targets=None) -> Crystal:
        """From a pymatgen `Structure`. Raises BadCrystal on partial occupancy or dummy species."""
        numbers = []
        for i, site in enumerate(structure):
            if not site.is_ordered:
                raise BadCrystal(
                    f"partial occupancy at site {i} ({site.species_string}): "
                    "give an ordered structure (for example by pymatgen's OrderDisordered"
                    "StructureTransformation)",
                    "partial occupancy",
                )
            number = getattr(site.specie, "Z", None)
            symbol = getattr(site.specie, "symbol", str(site.specie))
            if number is None or (symbol.startswith("X") and symbol != "Xe"):
                raise BadCrystal(f"unknown element {symbol!r} at site {i}", "unknown element")
            numbers.append(int(number))
        return cls.create(id, numbers, structure.frac_coords, structure.lattice.matrix, targets)

    @classmethod
    def from_ase(cls, atoms: Any, id: str = "", targets=None) -> Crystal:
        """From ASE `Atoms` that are periodic in three directions."""
        if not all(atoms.pbc):
            raise BadCrystal("the structure is not periodic in all three directions")
        cell = np.asarray(atoms.cell)
        if abs(np.linalg.det(cell)) < 1e-3:
            raise BadCrystal("the structure has no cell")
        frac = np.linalg.solve(cell.T, np.asarray(atoms.positions).T).T
        return cls.create(id, atoms.numbers, frac, cell, targets)

    def to_pymatgen(self):
        """As a pymatgen `Structure`."""
        from pymatgen.core import Element, Lattice, Structure

        species = [Element.from_Z(int(z)) for z in self.numbers]
        return Structure(Lattice(self.lattice), species, self.frac_coords)

    def to_ase(self):
        """As ASE `Atoms`."""
        from ase import Atoms

        return Atoms(
            numbers=self.numbers.astype(int),
            scaled_positions=self.frac_coords,
            cell=self.lattice,
            pbc=True,
        )


def _volume(rows: list[list[float]]) -> float:
    """Signed volume of a cell; of three rows numpy's determinant takes ten times as long."""
    (a, b, c), (d, e, f), (g, h, i) = rows
    return a * (e * i - f * h) + b * (f * g - d * i) + c * (d * h - e * g)


def plane_distances(lattice: np.ndarray) -> list[float]:
    """Å between neighbouring lattice planes that two of the cell vectors (rows) span."""
    rows = lattice.tolist()
    volume = abs(_volume(rows))
    found = []
    for (a, b, c), (d, e, f) in ((rows[1], rows[2]), (rows[2], rows[0]), (rows[0], rows[1])):
        found.append(volume / math.hypot(b * f - c * e, c * d - a * f, a * e - b * d))
    return found


def in_standard_orientation(lattice: np.ndarray, volume: float | None = None) -> np.ndarray:
    """Rows [3, 3] of a cell, turned so that a is along x and b in the xy plane, and right-handed:
    the lower-triangular Cholesky factor of its metric, or where that would lose digits, since the
    cell is very skewed or flat, that of QR. `volume` in Å³, where it is known."""
    rows = lattice.tolist()
    volume = abs(_volume(rows)) if volume is None else volume
    if volume > 0.01 * math.prod(math.hypot(*row) for row in rows):
        return np.linalg.cholesky(lattice @ lattice.T)
    upper = np.linalg.qr(lattice.T, mode="r")
    return (upper * np.sign(np.diagonal(upper))[:, None]).T


def wrap(frac: np.ndarray) -> np.ndarray:
    """Fractional coordinates into [0, 1); values within 1e-6 of 1 become 0."""
    frac = frac - np.floor(frac)
    frac[frac > 1 - 1e-6] = 0.0
    return frac


def crystal_key(seed: int, epoch: int, id: str) -> int:
    """The 63-bit number from which every random draw for a crystal in an epoch follows."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
