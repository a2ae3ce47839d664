"""JSON files of crystals, in the layouts that the field's databases ship."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.sources.base import NO, SOURCES, SURE, Options, Raw, numbered, pick_id
from crysforge.datapipe.sources.csv_files import NO_ID, TEXT_NAMES, text_payload
from crysforge.datapipe.sources.delimited import same_column
from crysforge.datapipe.sources.json_stream import JsonText
from crysforge.datapipe.sources.texts import open_text

_REMARKS = {"links", "meta", "query", "resource", "schema"}
"""What stands beside the records in the exports of OQMD's API and of pandas."""
_LINES = (".jsonl", ".ndjson")
_STRUCTURE_KEYS = {"@module", "@class", "@version", "lattice", "sites", "charge", "properties"}
_RECORD_KEYS = ("atoms", *TEXT_NAMES)
_LONGEST = 1 << 24
"""Characters of the longest record that stands alone, as lines of JSON do."""


@SOURCES.register("json", lambda look: SURE if look.suffix in (".json", *_LINES) else NO)
def read_json(path: Path, options: Options) -> Iterator[Raw]:
    """A JSON file (also `.json.gz`, `.json.zip`), streamed. By what it holds, whatever it is
    called, it is

    - a list of records, as JARVIS-DFT and MEGNet 2018.6 ship them, or one record after another
      (JSON lines);
    - a mapping from id to record;
    - a pandas table: "split", as Matbench ships them, "table", or columns;
    - one pymatgen `Structure`, or one record;
    - OQMD's API export, `{"data": [records]}`.

    A record has its structure under `atoms` (JARVIS: `lattice_mat`, `coords`, `elements`,
    `cartesian`), `structure` or `cif` (pymatgen dict, CIF or POSCAR text), `unit_cell` and `sites`
    (OQMD), or is itself a pymatgen dict. Its other fields are labels.
    """
    with open_text(path, options.note) as file:
        text = JsonText(file)
        if text.peek() not in ("[", "{"):
            raise ValueError(
                "it holds neither a list nor an object of crystals; if it is a table, give "
                "format=csv"
            )
        number = 0
        while text.peek():  # one record after another
            for key, record in _records(text, options):
                number += 1
                alone = number == 1 and not text.peek()
                yield _raw(path, options, 0 if alone else number, key, record)


Item = tuple[str | None, Any]
"""(id, record): the id where it is not in the record."""


def _records(text: JsonText, options: Options) -> Iterator[Item]:
    """The records in the next value of a text."""
    if text.peek() == "[":
        for record in text.items():
            yield None, record
        return
    fields = (*_RECORD_KEYS, options.structure_column)
    if text.peek() != "{" or _is_record(text.look(_LONGEST), fields):
        yield None, text.value()
        return
    table: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    for key in text.keys():  # noqa: SIM118  (a walk through the text, no mapping)
        if key in ("index", "columns"):
            table[key] = text.value()
        elif key == "data" and text.peek() == "[":
            for row_number, row in enumerate(text.items()):
                yield _row(table, row_number, row)
        elif text.peek() in ("{", "[") and key not in _REMARKS:
            value = text.value()
            if _is_record(value, fields):
                yield key, value
            else:
                columns[key] = value
        else:
            text.value()  # a remark about the file: date, version, count
    if any(field in columns for field in fields):
        yield from _transposed(columns)
    else:
        yield from columns.items()


def _is_record(value: Any, fields: Sequence[str | None]) -> bool:
    """Whether a value is a crystal with its labels, or without; in a table by columns a field has
    one value for each crystal."""
    if not isinstance(value, Mapping):
        return False
    if "sites" in value and ("lattice" in value or "unit_cell" in value):
        return not isinstance(value["sites"], Mapping)
    if {"lattice_mat", "coords"} <= value.keys():
        return True
    found = [value[f] for f in fields if f in value]
    return any(isinstance(x, str) or (isinstance(x, Mapping) and _is_structure(x)) for x in found)


def _is_structure(value: Mapping) -> bool:
    return "lattice" in value or "lattice_mat" in value


def _transposed(columns: Mapping[str, Any]) -> Iterator[Item]:
    """The records of a table that is given by columns, each a list or a mapping from row."""
    rows: dict[Any, dict[str, Any]] = {}
    for name, values in columns.items():
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        for row, value in pairs:
            rows.setdefault(row, {})[name] = value
    for record in rows.values():
        yield None, record


def _row(table: Mapping[str, Any], number: int, row: Any) -> Item:
    """A row of a pandas table as a record."""
    if not isinstance(row, list):
        return None, row
    columns, index = table.get("columns"), table.get("index")
    if number == 0 and isinstance(columns, list) and len(set(map(str, columns))) < len(columns):
        again = sorted({str(c) for c in columns if columns.count(c) > 1})
        raise ValueError(f"two columns are named {', '.join(again)}: rename or remove one")
    if not isinstance(columns, list) or len(columns) != len(row):
        raise ValueError(f"row {number} of 'data' does not fit 'columns', which must come first")
    record = dict(zip(map(str, columns), row, strict=True))
    key = index[number] if isinstance(index, list) and number < len(index) else number
    return (key if isinstance(key, str) else None), record


def _raw(path: Path, options: Options, number: int, key: str | None, record: Any) -> Raw:
    """A record; of number 0 if it is the only one in its file."""
    where = f"{path.name} record {number}" if number else path.name
    if not isinstance(record, Mapping):
        message = f"no crystal: found {str(record)[:40]!r}"
        return Raw(numbered(path, number, options), where, ("bad", (message, "unreadable")))
    if "lattice" in record and "sites" in record:
        return Raw(key or numbered(path, number, options), where, ("structure", record))
    if "lattice_mat" in record and "coords" in record:
        return Raw(key or numbered(path, number, options), where, ("atoms", record))
    labels = dict(record)
    if options.structure_column:
        column = same_column(options.structure_column, labels)
        if column is None:
            known = nearest(options.structure_column, labels)
            raise ValueError(f"{where} has no field {options.structure_column!r}: {known}")
        fields: tuple[str, ...] = (column,)
    elif "unit_cell" in labels and "sites" in labels:
        fields = ("unit_cell", "sites")
    else:
        exact = next((n for n in _RECORD_KEYS if n in labels), None)
        alike = exact or next((f for n in _RECORD_KEYS if (f := same_column(n, labels))), None)
        fields = (alike,) if alike else ()
    payload = text_payload([labels.pop(f) for f in fields] or [None])
    if key is None or options.id_column:
        id_name = pick_id(labels, options, where)
        found = labels.pop(id_name) if id_name else numbered(path, number, options)
    else:
        found = key
    if found in (None, ""):
        payload, found = NO_ID, ""
    return Raw(str(found), where, payload, labels)
