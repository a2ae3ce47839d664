"""extxyz files and ASE databases."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crysforge.datapipe.sources.base import (
    NO,
    SOURCES,
    SURE,
    Look,
    Options,
    Raw,
    numbered,
    pick_id,
)
from crysforge.datapipe.sources.texts import open_text

_NO_LABELS = ("Lattice", "Properties", "pbc", "origin", "Virtual_cell")


@SOURCES.register("extxyz", lambda look: SURE if look.suffix in (".extxyz", ".xyz") else NO)
def read_extxyz(path: Path, options: Options) -> Iterator[Raw]:
    """An extended xyz file (also `.extxyz.gz`): frames with `Lattice="…"`, periodic in three
    directions. Labels are the other keys of the comment lines."""
    from ase.io.extxyz import key_val_str_to_dict

    with open_text(path, options.note) as text:
        file = (line.rstrip("\r\n") + "\n" for line in text)
        number = 0
        for line in file:
            if not line.strip():
                continue
            number += 1
            where = f"{path.name} frame {number}"
            try:
                size = int(line)
                frame = [line, *(next(file) for _ in range(size + 1))]
            except ValueError:
                raise ValueError(
                    f"{where} should start with a number of atoms, found {line.strip()[:40]!r}"
                ) from None
            except RuntimeError:  # next() within the generator expression
                raise ValueError(f"{where} ends before its {size} atoms") from None
            frame[1] = _flat(frame[1])
            info: dict[str, Any] = key_val_str_to_dict(frame[1])
            labels = {k: v for k, v in info.items() if k not in _NO_LABELS}
            id_name = pick_id(labels, options, where)
            id = str(labels.pop(id_name)) if id_name else numbered(path, number, options)
            if "Lattice" not in info:
                yield Raw(id, where, ("bad", ("it has no Lattice: no crystal", "no cell")), labels)
            else:
                yield Raw(id, where, ("extxyz", "".join(frame)), labels)


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
    """An ASE database (SQLite, `.db`). Labels are the key-value pairs and the calculated scalars
    (`energy`, …) of its rows."""
    from ase.db import connect

    try:
        for row in connect(path, type="db").select():
            labels = dict(row.key_value_pairs)
            for name in ("energy", "free_energy", "magmom"):
                if name in row and name not in labels:
                    labels[name] = row[name]
            where = f"{path.name} row {row.id}"
            id_name = pick_id(labels, options, where)
            id = str(labels.pop(id_name)) if id_name else numbered(path, row.id, options)
            yield Raw(
                id, where, ("arrays", (row.numbers, row.positions, row.cell, row.pbc)), labels
            )
    except (sqlite3.DatabaseError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an ASE database: {type(error).__name__}: {error}") from None
