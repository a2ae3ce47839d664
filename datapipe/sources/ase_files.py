"""extxyz files and ASE databases."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from crysforge.datapipe.sources.base import (
    NO,
    SOURCES,
    SURE,
    Look,
    Options,
    Payload,
    Raw,
    numbered,
    pick_id,
)
from crysforge.datapipe.sources.texts import open_text

_COUNT = re.compile("[0-9]{1,12}")
_MAX_LINE = 1 << 22
"""Characters of the longest line of an extxyz file."""
_NO_LABELS = ("Lattice", "Properties", "pbc", "origin", "Virtual_cell")


@SOURCES.register("extxyz", lambda look: SURE if look.suffix in (".extxyz", ".xyz") else NO)
def read_extxyz(path: Path, options: Options) -> Iterator[Raw]:
    """An extended xyz file (also `.extxyz.gz`): frames with `Lattice="…"`, periodic in three
    directions. Labels are the other keys of the comment lines."""
    from ase.io.extxyz import key_val_str_to_dict

    with open_text(path, options.note) as text:
        lines = _lines(text, path.name)
        for number, line in enumerate((line for line in lines if line.strip()), start=1):
            where = f"{path.name} frame {number}"
            if not _COUNT.fullmatch(line.strip()):
                raise ValueError(
                    f"{where} should start with a number of atoms, found {line.strip()[:40]!r}"
                )
            size = int(line)
            frame = [line, *islice(lines, 1 + min(size, options.max_atoms))]
            rest = sum(1 for _ in islice(lines, max(0, size - options.max_atoms)))
            if len(frame) + rest < size + 2:
                raise ValueError(f"{where} ends before its {size} atoms")
            frame[1] = _flat(frame[1])
            info: dict[str, Any] = key_val_str_to_dict(frame[1])
            labels = {k: v for k, v in info.items() if k not in _NO_LABELS}
            id_name = pick_id(labels, options, where)
            id = str(labels.pop(id_name)) if id_name else numbered(path, number, options)
            payload: Payload = ("extxyz", "".join(frame))
            if "Lattice" not in info:
                payload = ("bad", ("it has no Lattice: no crystal", "no cell"))
            elif rest:
                message = f"it has {size} atoms, more than limits.atoms={options.max_atoms}"
                payload = ("bad", (message, "too many atoms"))
            yield Raw(id, where, payload, labels)


def _lines(file: TextIO, name: str) -> Iterator[str]:
    """The lines of a file, none of which is too long to be one."""
    for number in count(1):
        line = file.readline(_MAX_LINE)
        if len(line) == _MAX_LINE and not line.endswith("\n"):
            raise ValueError(f"{name} line {number} has more than {_MAX_LINE} characters")
        if not line:
            return
        yield line


def _flat(comment: str) -> str:
    """A comment line with its matrices as quoted rows, which ASE reads: `Lattice=[[a], [b], [c]]`,
    whose rows are the cell vectors, as `Lattice="a b c"`."""
    return _MATRIX.sub(lambda m: f'{m[1]}="{" ".join(_NUMBER.findall(_fortran(m[2])))}"', comment)


def _fortran(text: str) -> str:
    return re.sub(r"(?<=[\d.])[dD](?=[+-]?\d)", "e", text)


_MATRIX = re.compile(
    r"""(\w+)\s*=\s*(?:(?=\[\s*\[|["'{\[][^"'}\]]*\d[dD][+-]?\d))"""
    r"""(\[\s*\[[-+\d.eEdD,\s\[\]]+\]\s*\]|["'{\[][-+\d.eEdD,\s]+["'}\]])"""
)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)


def _likes_db(look: Look) -> int:
    return SURE if look.suffix == ".db" else NO


@SOURCES.register("ase-db", _likes_db)
def read_ase_db(path: Path, options: Options) -> Iterator[Raw]:
    """An ASE database (SQLite, `.db`, version 5 or later). Labels are the key-value pairs and the
    calculated scalars (`energy`, …) of its rows.

    It is opened for reading only, and row by row. A file whose `systems` is computed instead of
    stored (a view, a virtual table, generated columns) is refused: it can be endless.
    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            columns = _stored_columns(database)
            names = [name for name in (*_STRUCTURE, *_SCALARS) if name in columns]
            for values in database.execute(f"SELECT {', '.join(names)} FROM systems ORDER BY id"):
                yield _row(dict(zip(names, values, strict=True)), path, options)
    except (sqlite3.Error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an ASE database: {type(error).__name__}: {error}") from None


_STRUCTURE = ("id", "numbers", "positions", "cell", "pbc", "key_value_pairs")
_SCALARS = ("energy", "free_energy", "magmom")


def _stored_columns(database: sqlite3.Connection) -> set[str]:
    """Columns of the table of structures.

    Raises:
        ValueError: it lacks some, or does not store what it shows.
    """
    database.execute("PRAGMA trusted_schema = OFF")
    kinds = database.execute(
        "SELECT type, sql FROM sqlite_master WHERE name = 'systems'"
    ).fetchall()
    if [kind for kind, _ in kinds] != ["table"] or "VIRTUAL" in str(kinds[0][1]).upper()[:20]:
        what = "no table" if not kinds else "a computed table"
        raise ValueError(f"not an ASE database: it has {what} 'systems'")
    columns = {row[1]: row[6] for row in database.execute("PRAGMA table_xinfo(systems)")}
    for name in _STRUCTURE:
        if columns.get(name) != 0:
            what = "computed" if name in columns else "missing"
            raise ValueError(f"not an ASE database: column {name!r} of 'systems' is {what}")
    return {name for name, hidden in columns.items() if hidden == 0}


def _row(row: dict[str, Any], path: Path, options: Options) -> Raw:
    where = f"{path.name} row {row['id']}"
    labels = json.loads(row["key_value_pairs"])
    for name in _SCALARS:
        if row.get(name) is not None:
            labels.setdefault(name, row[name])
    id_name = pick_id(labels, options, where)
    id = str(labels.pop(id_name)) if id_name else numbered(path, row["id"], options)
    if (atoms := len(row["numbers"]) // 4) > options.max_atoms:
        message = f"it has {atoms} atoms, more than limits.atoms={options.max_atoms}"
        return Raw(id, where, ("bad", (message, "too many atoms")), labels)
    try:
        numbers = np.frombuffer(row["numbers"], "<i4")
        positions = np.frombuffer(row["positions"], "<f8").reshape(len(numbers), 3)
        cell = np.frombuffer(row["cell"], "<f8").reshape(3, 3)
    except ValueError as error:
        return Raw(id, where, ("bad", (f"its arrays are damaged: {error}", "unreadable")), labels)
    pbc = [bool(row["pbc"] >> axis & 1) for axis in range(3)]
    return Raw(id, where, ("arrays", (numbers, positions, cell, pbc)), labels)
