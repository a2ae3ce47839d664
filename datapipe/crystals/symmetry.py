"""Space groups of crystals."""

from __future__ import annotations

from typing import Any

from crysforge.datapipe.crystals.crystal import Crystal

SYMPREC = 0.01
"""Tolerance in Å; with an angle tolerance of 5° this is what pymatgen takes."""


def space_group(crystal: Crystal, symprec: float = SYMPREC) -> int:
    """International number of the space group, 1..230; 1 where the search fails."""
    import spglib

    cell: Any = crystal.lattice, crystal.frac_coords, crystal.numbers
    try:
        found = spglib.get_symmetry_dataset(cell, symprec=symprec, angle_tolerance=5)
    except getattr(spglib, "SpglibError", ()):  # older releases return None instead
        found = None
    return 1 if found is None else int(found.number)
