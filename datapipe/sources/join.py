"""Labels from a table of their own, joined with the records of any source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from crysforge.datapipe.sources.base import TABLES, Look, Options, Raw
from crysforge.datapipe.sources.delimited import same_column
from crysforge.datapipe.sources.file_names import Names
from crysforge.datapipe.sources.labels import LabelTable, read_table
from crysforge.datapipe.sources.texts import SAVE_AS_TEXT, WORKBOOKS, open_text
from crysforge.datapipe.sources.values import is_labelled


def join(read: Callable[[], Iterator[Raw]], path: Path, options: Options) -> Iterator[Raw]:
    """Records with the labels that a table has for them, found by the paths of their files or by
    their ids. Nothing is left out: a record that the table does not list stays as it is.

    Args:
        read: gives the records; it is called twice, first to see what there is.

    Raises:
        ValueError: the table cannot be read, lists no record, lists one twice with different
            labels, or has another value of a label than the record itself.
    """
    if not path.is_file():
        raise ValueError(f"labels={path} does not exist")
    with open_text(path, options.note) as file:
        text = file.read()
    if text.lstrip()[:1] in ("{", "["):
        raise ValueError(f"labels={path} is JSON: give the labels as a table (CSV)")
    ids = {_place(raw): raw.id for raw in read()}
    table = read_table(text, path.name, Names(ids), options, options.id_column)
    rows: dict[str, Mapping[str, str]] = {}
    for row in table.rows:
        if row.file is not None and rows.setdefault(row.file, row.labels) != row.labels:
            raise ValueError(
                f"{table.name} lists {row.key!r} more than once (line {row.line}) with different "
                "labels: keep one"
            )
    if not rows:
        some = ", ".join(repr(row.key) for row in table.rows[:2])
        raise ValueError(
            f"labels={path} lists no crystal of the input: column {table.column} has {some}, ids "
            f"are like {next(iter(ids.values()), None)!r}; name the right column with id_column=…"
        )
    options.note(_told(table, len(rows), len(ids)))
    for raw in read():
        labels = rows.get(_place(raw))
        yield replace(raw, labels=_merged(raw, labels, table.name)) if labels else raw


def _place(raw: Raw) -> str:
    """The path of a record's file within the input, or its id if it has no file of its own."""
    if raw.payload[0] in ("file", "content", "member"):
        return raw.where.partition("/")[2] or raw.where
    return raw.id


def _merged(raw: Raw, labels: Mapping[str, str], table: str) -> dict[str, Any]:
    """Labels of a record and of the table, which may not contradict each other."""
    merged = dict(raw.labels)
    for name, value in labels.items():
        own = merged.get(name)
        if is_labelled(own) and is_labelled(value) and str(own) != value:
            raise ValueError(
                f"{raw.where} (id {raw.id!r}) has {name!r} {str(own)[:40]!r} and {table} has "
                f"{value!r}: rename or remove one"
            )
        if not is_labelled(own):
            merged[name] = value
    return merged


def _told(table: LabelTable, used: int, count: int) -> str:
    text = f"{table.name}: column {table.column} names {used:,} of {count:,} crystals"
    spare = [row.key for row in table.rows if row.file is None]
    if spare:
        text += f"; {len(spare):,} of its rows name none, such as {spare[0]!r}"
    return text


def remedy(name: str, path: Path) -> str:
    """What to give so that an input has a label that is in a file beside it, or in it: a table
    with a column of this name, or perhaps a workbook. Empty where there is neither."""
    if tables := tables_with(name, path):
        return f"{tables[0].name} has it: give labels={tables[0]}"
    folders = [path.parent, *([path] if path.is_dir() else [])]
    files = [f.name for folder in folders for f in sorted(folder.iterdir())]
    books = [n for n in files if n.lower().endswith(WORKBOOKS)]
    return f"if {books[0]} has it, {SAVE_AS_TEXT} as labels=TABLE" if books else ""


def tables_with(name: str, path: Path) -> list[Path]:
    """Tables beside an input, or in it, that have a column of this name."""
    folders = [path.parent, *([path] if path.is_dir() else [])]
    found = []
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file != path and file.is_file() and Look(file).suffix in TABLES:
                found += [file] if same_column(name, Look(file).columns) else []
    return found
