"""Structures that a program holds in memory, as raw records: read as files are, refused as files
are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.sources.base import Payload, Raw

TAKEN = (
    "a pymatgen Structure, ASE Atoms, JARVIS Atoms, Crystal, one of these as a dict, the text of a "
    "CIF or POSCAR, or a path"
)
"""What a structure may be."""


def is_structure_object(item: Any) -> bool:
    """Whether something is one structure, not a collection of them."""
    names = ("lattice", "lattice_mat", "get_scaled_positions")
    return isinstance(item, Crystal | Mapping | str) or any(hasattr(item, n) for n in names)


def as_raw(item: Any, number: int) -> Raw:
    """The raw record of one structure in memory, the `number`-th of those that are given."""
    id = item.id if isinstance(item, Crystal) and item.id else str(number)
    return Raw(id, f"structure {number}", _payload(item))


def _payload(item: Any) -> Payload:
    if isinstance(item, Crystal):
        return "crystal", item
    if isinstance(item, Mapping):
        return _of_mapping(item)
    if isinstance(item, str):
        return "text", item
    if hasattr(item, "get_scaled_positions"):
        return "ase", item
    if hasattr(item, "lattice_mat") and hasattr(item, "to_dict"):
        return "atoms", item.to_dict()
    if hasattr(item, "lattice") and hasattr(item, "frac_coords"):
        return "pymatgen", item
    return "bad", (f"{type(item).__name__} is no structure: give {TAKEN}", "unreadable")


def _of_mapping(item: Mapping[str, Any]) -> Payload:
    if "sites" in item and "lattice" in item:
        return "structure", item
    if "lattice_mat" in item:
        return "atoms", item
    if {"numbers", "positions", "cell"} <= item.keys():
        return "arrays", tuple(item.get(k) for k in ("numbers", "positions", "cell", "pbc"))
    for name in ("structure", "atoms", "cif", "poscar"):  # a record of a data set
        if name in item:
            return _payload(item[name])
    keys = ", ".join(list(map(str, item))[:6])
    return "bad", (f"a dict with {keys or 'nothing'} is no structure: give {TAKEN}", "unreadable")
