"""CSV files with a structure in every row: the CDVAE layout (`cif` column) and OQMD's export."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.escape import one_line
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.sources.base import (
    MAYBE,
    NO,
    SOURCES,
    SURE,
    Look,
    Options,
    Payload,
    Raw,
    numbered,
    open_text,
    pick_id,
)

TEXT_NAMES = ("cif", "structure", "poscar", "POSCAR", "cif_string", "atoms")
"""Columns that hold a structure, the likeliest first."""

_LONGEST = 1 << 26
"""Bytes of the longest field; the csv module's own limit is too small for large cells."""


def _likes(look: Look) -> int:
    if look.suffix != ".csv":
        return NO
    return SURE if _structure_fields(look.columns) else MAYBE


def _structure_fields(names: Sequence[str]) -> tuple[str, ...]:
    if {"unit_cell", "sites"} <= set(names):
        return ("unit_cell", "sites")
    return next(((n,) for n in TEXT_NAMES if n in names), ())


@SOURCES.register("csv", _likes)
def read_csv(path: Path, options: Options) -> Iterator[Raw]:
    """A CSV file (`.csv`, `.csv.gz`) with a header and one crystal per row.

    The structure is CIF, POSCAR or JSON text in a column (`cif`, or `structure_column`), or OQMD's
    `unit_cell` and `sites`. All other columns are labels. Without an id column, ids are
    `<file>-<row>`.
    """
    limit = csv.field_size_limit(_LONGEST)
    try:
        with open_text(path) as file:
            yield from _rows(csv.reader(file), path, options)
    finally:
        csv.field_size_limit(limit)


def _rows(reader: Iterator[list[str]], path: Path, options: Options) -> Iterator[Raw]:
    names = next(reader, [])
    if not names:
        raise ValueError(f"{path.name} is empty: the first line must name the columns")
    if options.structure_column is not None:
        fields: tuple[str, ...] = (options.structure_column,)
        if fields[0] not in names:
            raise ValueError(
                f"{path.name} has no structure column {fields[0]!r}: {nearest(fields[0], names)}"
            )
    elif not (fields := _structure_fields(names)):
        raise ValueError(
            f"{path.name} has no column 'cif': name the column that holds the structure with "
            f"structure_column=…, one of {', '.join(map(one_line, names))}"
        )
    id_name = pick_id(names, options, path.name)
    for number, row in enumerate(filter(None, reader), start=1):
        where = f"{path.name} row {number}"
        if len(row) == len(names):
            record = dict(zip(names, row, strict=True))
            payload = text_payload([record.pop(f) for f in fields])
        else:
            message = f"{len(row)} fields, the header has {len(names)}"
            record, payload = dict(zip(names, row, strict=False)), ("bad", (message, "unreadable"))
        found = record.pop(id_name, "") if id_name else numbered(path, number, options)
        yield Raw(found, where, payload if found else NO_ID, record)


NO_ID: Payload = ("bad", ("the record has an empty id", "no id"))


def text_payload(values: Sequence[Any]) -> Payload:
    """The payload for the values of a record's structure fields."""
    if len(values) == 2:
        return "oqmd", {"unit_cell": values[0], "sites": values[1]}
    value = values[0]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return "json", value
    if isinstance(value, str):
        return "text", value
    if isinstance(value, Mapping):
        return ("structure" if "sites" in value else "atoms"), value
    return "bad", (f"no structure: found {str(value)[:40]!r}", "unreadable")
