"""JSON files of crystals, in the layouts that the field's databases ship."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.sources.base import (
    NO,
    SOURCES,
    SURE,
    Options,
    Raw,
    numbered,
    open_text,
    pick_id,
)
from crysforge.datapipe.sources.csv_files import NO_ID, TEXT_NAMES, text_payload
from crysforge.datapipe.sources.json_stream import JsonText

_REMARKS = {"links", "meta", "query", "resource"}
"""What the API of the OQMD puts beside its records."""
_LINES = (".jsonl", ".ndjson")
_STRUCTURE_KEYS = {"@module", "@class", "@version", "lattice", "sites", "charge", "properties"}


@SOURCES.register("json", lambda look: SURE if look.suffix in (".json", *_LINES) else NO)
def read_json(path: Path, options: Options) -> Iterator[Raw]:
    """A JSON file (also `.json.gz`, `.json.zip`), streamed. It may be

    - a list of records, as JARVIS-DFT and MEGNet 2018.6 ship them, or one record per line;
    - a mapping from id to record;
    - a pandas "split" table, as Matbench ships them;
    - one pymatgen `Structure`;
    - OQMD's API export, `{"data": [records]}`.

    A record has its structure under `atoms` (JARVIS: `lattice_mat`, `coords`, `elements`,
    `cartesian`), `structure` or `cif` (pymatgen dict, CIF or POSCAR text), `unit_cell` and `sites`
    (OQMD), or is itself a pymatgen dict. Its other fields are labels.
    """
    with open_text(path) as file:
        text = JsonText(file)
        if text.peek() not in ("[", "{"):
            raise ValueError("it holds neither a list nor an object of crystals")
        lines = any(s.lower() in _LINES for s in path.suffixes)
        for number, (key, record) in enumerate(_lines(text) if lines else _records(text)):
            yield _raw(path, options, number, key, record)


Item = tuple[str | None, Any]
"""(id, record): the id where it is not in the record."""


def _lines(text: JsonText) -> Iterator[Item]:
    while text.peek():
        yield None, text.value()


def _records(text: JsonText) -> Iterator[Item]:
    if text.peek() == "[":
        for record in text.items():
            yield None, record
        return
    single: dict[str, Any] = {}
    table: dict[str, Any] = {}
    for key in text.keys():  # noqa: SIM118  (a walk through the text, no mapping)
        if key in ("index", "columns"):
            table[key] = text.value()
        elif key == "data" and text.peek() == "[":
            for row_number, row in enumerate(text.items()):
                yield _row(table, row_number, row)
        elif key in _STRUCTURE_KEYS:
            single[key] = text.value()
        elif text.peek() in ("{", "[") and key not in _REMARKS:
            yield key, text.value()
        else:
            text.value()  # a remark about the file: date, version, count
    if "sites" in single:
        yield None, single


def _row(table: Mapping[str, Any], number: int, row: Any) -> Item:
    """A row of a pandas table as a record."""
    if not isinstance(row, list):
        return None, row
    columns, index = table.get("columns"), table.get("index")
    if not isinstance(columns, list) or len(columns) != len(row):
        raise ValueError(f"row {number} of 'data' does not fit 'columns', which must come first")
    record = dict(zip(map(str, columns), row, strict=True))
    key = index[number] if isinstance(index, list) and number < len(index) else number
    return (key if isinstance(key, str) else None), record


def _raw(path: Path, options: Options, number: int, key: str | None, record: Any) -> Raw:
    where = f"{path.name} record {number + 1}"
    if not isinstance(record, Mapping):
        message = f"no crystal: found {str(record)[:40]!r}"
        return Raw(numbered(path, number + 1, options), where, ("bad", (message, "unreadable")))
    if "lattice" in record and "sites" in record:
        return Raw(key or numbered(path, number + 1, options), where, ("structure", record))
    labels = dict(record)
    if options.structure_column:
        fields: tuple[str, ...] = (options.structure_column,)
        if fields[0] not in labels:
            raise ValueError(f"{where} has no field {fields[0]!r}: {nearest(fields[0], labels)}")
    elif "unit_cell" in labels and "sites" in labels:
        fields = ("unit_cell", "sites")
    else:
        fields = next(((n,) for n in ("atoms", *TEXT_NAMES) if n in labels), ())
    payload = text_payload([labels.pop(f) for f in fields] or [None])
    if key is None or options.id_column:
        id_name = pick_id(labels, options, where)
        found = labels.pop(id_name) if id_name else numbered(path, number + 1, options)
    else:
        found = key
    if found in (None, ""):
        payload, found = NO_ID, ""
    return Raw(str(found), where, payload, labels)
