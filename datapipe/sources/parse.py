"""From the payload of a raw record to a `Crystal`; runs in worker processes."""

from __future__ import annotations

import ast
import io
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from crysforge.datapipe.crystals.crystal import MAX_LABEL, BadCrystal, Crystal
from crysforge.datapipe.sources.base import Payload, check_size
from crysforge.datapipe.sources.cif import read_cif

_NUMBERS = {**atomic_numbers, "D": 1, "T": 1}
del _NUMBERS["X"]

MISSING = ("", "na")
"""Texts (in lower case) that stand for a label nobody measured."""


def parse(payload: Payload) -> Crystal:
    """The crystal of a payload, without id and labels.

    Raises:
        BadCrystal: for whatever reason it cannot be made; says which.
    """
    kind, data = payload
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _PARSERS[kind](data)
        except (BadCrystal, MemoryError):
            raise
        except Exception as error:  # foreign parsers raise anything on malformed text
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadCrystal(f"cannot read the structure: {reason[:200]}", "unreadable") from None


def parse_label(name: str, value: Any) -> float:
    """A label as a number; NaN where it is missing (None, empty, "na").

    Raises:
        BadCrystal: text, infinity, an explicit NaN, a number beyond `MAX_LABEL`.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return math.nan
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadCrystal(
            f"label {name!r} is {str(value)[:40]!r}: give a finite number, or leave it empty if "
            "it is unknown",
            "bad label",
        )
    if abs(number) > MAX_LABEL:
        raise BadCrystal(
            f"label {name!r} is {number:g}, beyond ±{MAX_LABEL:g}: give it in another unit",
            "bad label",
        )
    return number


def is_labelled(value: Any) -> bool:
    """Whether a raw label counts as present in the published split rule: not None, "na" or NaN."""
    if isinstance(value, float):
        return not math.isnan(value)
    return value is not None and str(value).strip().lower() not in (*MISSING, "nan")


def _atomic_number(symbol: Any) -> int:
    number = _NUMBERS.get(str(symbol).strip())
    if number is None:
        raise BadCrystal(f"unknown element {symbol!r}", "unknown element")
    return number


def _text(text: str) -> Crystal:
    """CIF or POSCAR."""
    if "_cell_length_a" in text or text.lstrip().startswith("data_"):
        return read_cif(text)
    if len(text.split()) < 12:
        raise BadCrystal("the text is neither a CIF nor a POSCAR", "unreadable")
    return _poscar(text)


def _poscar(text: str) -> Crystal:
    from pymatgen.io.vasp import Poscar

    # pymatgen would call the elements of a VASP 4 file H, He, Li, ...
    warnings.filterwarnings("error", message="Elements in POSCAR cannot be determined")
    return Crystal.from_pymatgen(Poscar.from_str(text).structure)


def _file(path: str) -> Crystal:
    file = Path(path)
    if not file.is_file():  # nor does a pipe hold one
        raise BadCrystal("the file does not exist", "missing file")
    check_size(file.name, file.stat().st_size)
    return _named(path, file.read_text(encoding="utf-8", errors="replace"))


def _member(place: tuple[str, str]) -> Crystal:
    archive, name = _open_zip(place[0]), place[1]
    check_size(name, archive.getinfo(name).file_size)
    return _named(name, archive.read(name).decode("utf-8", errors="replace"))


@lru_cache(maxsize=2)
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _named(name: str, text: str) -> Crystal:
    return read_cif(text) if name.lower().endswith(".cif") else _text(text)


def _atoms(atoms: Mapping[str, Any]) -> Crystal:
    """JARVIS `atoms`: lattice_mat, coords, elements, cartesian."""
    _expect(atoms, "lattice_mat", "coords", "elements")
    cell = np.array(atoms["lattice_mat"], dtype=np.float64)
    coords: np.ndarray = np.array(atoms["coords"], dtype=np.float64)
    numbers = [_atomic_number(x) for x in atoms["elements"]]
    if str(atoms.get("cartesian", False)).lower() == "true":
        coords = np.linalg.solve(cell.T, coords.T).T
    return Crystal.create("", numbers, coords, cell)


def _structure(structure: Mapping[str, Any]) -> Crystal:
    """A pymatgen `Structure` as dict; ordered sites are read without pymatgen."""
    _expect(structure, "lattice", "sites")
    numbers = []
    for i, site in enumerate(structure["sites"]):
        species = site["species"]
        if len(species) != 1 or abs(species[0]["occu"] - 1) > 1e-8:
            shown = ", ".join(f"{s['element']}:{s['occu']:g}" for s in species)
            raise BadCrystal(
                f"partial occupancy at site {i} ({shown}): give an ordered structure",
                "partial occupancy",
            )
        numbers.append(_atomic_number(species[0]["element"]))
    coords = [site["abc"] for site in structure["sites"]]
    return Crystal.create("", numbers, coords, structure["lattice"]["matrix"])


def _oqmd(record: Mapping[str, Any]) -> Crystal:
    """OQMD's export: `unit_cell` 3 x 3 in Å and `sites` ["Al @ 0 0 0.5", ...], lists or text."""
    cell, sites = (_literal(record[k]) for k in ("unit_cell", "sites"))
    numbers, coords = [], []
    for site in sites:
        symbol, _, place = site.partition("@")
        numbers.append(_atomic_number(symbol))
        coords.append([float(x) for x in place.split()])
    return Crystal.create("", numbers, coords, cell)


def _literal(value: Any) -> Any:
    """Lists written as JSON or Python text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value)  # makes values, runs nothing
    except MemoryError:  # of the parser's stack
        raise ValueError("the text is nested too deeply") from None


def _json(text: str) -> Crystal:
    record = json.loads(text)
    return _structure(record) if "sites" in record else _atoms(record)


def _arrays(data: tuple[Any, Any, Any, Any]) -> Crystal:
    """Atomic numbers [n], positions [n, 3] and cell [3, 3] in Å, periodicity [3]."""
    from ase import Atoms

    numbers, positions, cell, pbc = data
    return Crystal.from_ase(Atoms(numbers=numbers, positions=positions, cell=cell, pbc=pbc))


def _extxyz(text: str) -> Crystal:
    from ase.io import read

    return Crystal.from_ase(read(io.StringIO(text), format="extxyz"))


def _bad(message: tuple[str, str]) -> Crystal:
    raise BadCrystal(*message)


def _expect(mapping: Any, *keys: str) -> None:
    missing = [k for k in keys if not isinstance(mapping, Mapping) or k not in mapping]
    if missing:
        raise BadCrystal(f"the structure has no {', '.join(map(repr, missing))}", "unreadable")


def _prototype(place: tuple[int, int]) -> Crystal:
    from crysforge.datapipe.crystals.prototypes import prototype_crystal

    return prototype_crystal(*place)


_PARSERS: Mapping[str, Callable[[Any], Crystal]] = {
    "arrays": _arrays,
    "atoms": _atoms,
    "bad": _bad,
    "crystal": lambda crystal: crystal,
    "extxyz": _extxyz,
    "file": _file,
    "json": _json,
    "member": _member,
    "oqmd": _oqmd,
    "prototype": _prototype,
    "structure": _structure,
    "text": _text,
}
"""Payload kinds: what `Raw.payload` may be."""
