"""Which tables in a folder or archive list its crystals and say their labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from crysforge.datapipe.common.text import decode
from crysforge.datapipe.sources.base import TABLES, Options
from crysforge.datapipe.sources.delimited import same_column
from crysforge.datapipe.sources.file_names import Names, is_structure, without_packing
from crysforge.datapipe.sources.files import Files
from crysforge.datapipe.sources.labels import LabelTable, by_split, of_split, read_table
from crysforge.datapipe.storage.manifest import SPLITS

_MOST_TABLES = 20
"""Tables that are looked into for labels."""


def tables_in(files: Files) -> list[str]:
    """Tables that may hold labels, `id_prop` first."""
    found = [n for n in files.names if _suffix(n) in TABLES and not is_structure(n)]
    return sorted(found, key=lambda n: (not _is_id_prop(n), TABLES.index(_suffix(n))))


def _suffix(name: str) -> str:
    return Path(without_packing(name).lower()).suffix


def _is_id_prop(name: str) -> bool:
    return name.rsplit("/", 1)[-1].lower().startswith("id_prop")


def choose_tables(
    files: Files, names: Names, options: Options
) -> tuple[list[LabelTable], set[str]]:
    """The tables that say which files are crystals of the set, and their labels: one for each split
    where there are such, else `id_prop.csv`, else, if labels are wanted, the one that has them. And
    the names of all that are used.

    Raises:
        ValueError: several tables could be meant; the only ones have a fault.
    """

    def read(name: str) -> LabelTable:
        notes: list[str] = []
        text = decode(files.read(name), notes)
        for note in notes:
            options.note(f"{name}: {note}")
        return read_table(text, name, names, options, options.structure_column)

    every = tables_in(files)
    splits = by_split(every)
    lists = [of_split(read(name), split) for split, name in sorted(splits.items(), key=_nth)]
    lists = lists if all(t.found for t in lists) else []
    if lists:
        every = [n for n in every if n not in splits.values()]
        if absent := [s for s in SPLITS if s not in splits]:
            options.note(f"no table is of {absent[0]}: that split is empty")
        if all(same_column(w, t.labels) for w in options.wanted for t in lists):
            return lists, {t.name for t in lists}
    found = _labelled(files, every, read, options)
    if lists and found:
        return [_listed_in(t, found[0]) for t in lists], {t.name for t in (*lists, *found)}
    return lists or found, {t.name for t in lists or found}


def _labelled(
    files: Files, every: list[str], read: Callable[[str], LabelTable], options: Options
) -> list[LabelTable]:
    """The table with the labels that are wanted, if there is one; else `id_prop.csv`."""
    found: list[LabelTable] = []
    faults: list[ValueError] = []
    first = next((n for n in every if PurePosixPath(n.lower()).name.startswith("id_prop.")), None)
    if first and not options.wanted:
        return [read(first)]
    some = every if options.wanted else [n for n in every if _is_id_prop(n)]
    for name in some[:_MOST_TABLES]:
        try:
            table = read(name)
        except ValueError as error:
            faults.append(error)
            continue
        found += [table] if table.fits() or name == first else []
    if faults and (not found or first not in (None, *(t.name for t in found))):
        raise faults[0]
    chosen = [t for t in found if _means(t, options.wanted)] or found
    if first and all(t.name == first or not _means(t, options.wanted) for t in found):
        chosen = [t for t in found if t.name == first]
    if len(chosen) > 1:
        listed = ", ".join(t.name for t in chosen)
        raise ValueError(
            f"{files.path} has several tables of labels ({listed}): say which with "
            f"labels={files.path / chosen[0].name}"
        )
    for table in chosen:
        if table.name != first:
            options.note(
                f"labels are those of {table.name}, whose column {table.column} names "
                f"{table.found:,} of {table.files:,} files"
            )
    return chosen


def _listed_in(split: LabelTable, table: LabelTable) -> LabelTable:
    """The rows of a table that are of a split, from a list of its files."""
    rows = {row.file: row for row in table.rows if row.file is not None}
    return replace(split, rows=[rows.get(row.file, row) if row.file else row for row in split.rows])


def _means(table: LabelTable, wanted: Sequence[str]) -> bool:
    """Whether a table says itself that it has these labels: in its header, or by its name."""
    if table.headed:
        return all(same_column(name, table.labels) for name in wanted)
    words = re.split(r"[\s.,;]+", table.name.rsplit("/", 1)[-1].lower().replace("id_prop_", ""))
    return len(wanted) == 1 and wanted[0].lower() in words


def _nth(item: tuple[str, str]) -> int:
    return SPLITS.index(item[0])
