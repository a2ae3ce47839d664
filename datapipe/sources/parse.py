"""From the payload of a raw record to a `Crystal`; runs in worker processes."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from crysforge.datapipe.cif import read_cif
from crysforge.datapipe.common.text import decode
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.prototypes import prototype_crystal
from crysforge.datapipe.sources.base import Payload
from crysforge.datapipe.sources.poscar import read_poscar
from crysforge.datapipe.sources.texts import check_size

_NUMBERS = {**atomic_numbers, "D": 1, "T": 1}
del _NUMBERS["X"]


def parse(payload: Payload, checks: str = "strict") -> Crystal:
    """The crystal of a payload, without id and labels.

    Args:
        checks: what to do with a CIF that contradicts itself, see `datapipe.cif.read_cif`.

    Raises:
        BadCrystal: for whatever reason it cannot be made; says which.
    """
    kind, data = payload
    try:
        if kind in _TEXTS:
            with np.errstate(all="ignore"):
                return _TEXTS[kind](data, checks)
        with warnings.catch_warnings():  # of foreign parsers; takes its time
            warnings.simplefilter("ignore")
            return _PARSERS[kind](data)
    except (BadCrystal, MemoryError):
        raise
    except Exception as error:  # foreign parsers raise anything on malformed text
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadCrystal(f"cannot read the structure: {reason[:200]}", "unreadable") from None


def _atomic_number(symbol: Any) -> int:
    number = _NUMBERS.get(str(symbol).strip())
    if number is None:
        raise BadCrystal(f"unknown element {symbol!r}", "unknown element")
    return number


def _text(text: str, checks: str) -> Crystal:
    """CIF or POSCAR."""
    if "_cell_length_a" in text or _CIF.search(text):
        return read_cif(text, checks)
    if len(text.split()) < 12:
        raise BadCrystal("the text is neither a CIF nor a POSCAR", "unreadable")
    return read_poscar(text)


_CIF = re.compile(r"^\s*_cell[._]length_a\b|\A(?:\s*#.*)*\s*data_\S", re.MULTILINE | re.IGNORECASE)


def _file(path: str, checks: str) -> Crystal:
    return _content(Path(path).name, _bytes(path), checks)


def _block(place: tuple[str, int], checks: str) -> Crystal:
    """One of the structures in a CIF, by its number."""
    notes: list[str] = []
    crystal = read_cif(decode(_bytes(place[0]), notes), checks, place[1])
    return replace(crystal, notes=(*notes, *crystal.notes))


def _bytes(path: str) -> bytes:
    file = Path(path)
    if not file.is_file():  # nor does a pipe hold one
        raise BadCrystal("the file does not exist", "missing file")
    check_size(file.name, file.stat().st_size)
    return file.read_bytes()


def _member(place: tuple[str, str], checks: str) -> Crystal:
    path, name = place
    archive = _open_zip(path, os.stat(path).st_mtime_ns)
    check_size(name, archive.getinfo(name).file_size)
    return _content(name, archive.read(name), checks)


@lru_cache(maxsize=2)
def _open_zip(path: str, changed: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _content(name: str, data: bytes, checks: str) -> Crystal:
    """A structure file by its name and bytes."""
    notes: list[str] = []
    text = decode(data, notes)
    crystal = read_cif(text, checks) if _IS_CIF.search(name) else _text(text, checks)
    return replace(crystal, notes=(*notes, *crystal.notes)) if notes else crystal


_IS_CIF = re.compile(r"\.m?cif(\.(gz|bz2|xz))?$", re.IGNORECASE)


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
    record = _literal(text)
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


_PARSERS: Mapping[str, Callable[[Any], Crystal]] = {
    "arrays": _arrays,
    "ase": Crystal.from_ase,
    "atoms": _atoms,
    "bad": _bad,
    "crystal": lambda crystal: crystal,
    "extxyz": _extxyz,
    "json": _json,
    "oqmd": _oqmd,
    "prototype": lambda place: prototype_crystal(*place),
    "pymatgen": Crystal.from_pymatgen,
    "structure": _structure,
}
_TEXTS: Mapping[str, Callable[[Any, str], Crystal]] = {
    "block": _block,
    "content": lambda file, checks: _content(file[0], file[1], checks),
    "file": _file,
    "member": _member,
    "text": _text,
}
"""Payload kinds: what `Raw.payload` may be; these are held against themselves."""
