"""Folders and archives of structure files, with or without tables of labels, and folders of other
files that hold crystals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from crysforge.datapipe.common.text import decode
from crysforge.datapipe.sources.base import (
    MAYBE,
    NO,
    SOURCES,
    SURE,
    TABLES,
    Look,
    Options,
    Raw,
)
from crysforge.datapipe.sources.delimited import same_column, sniff
from crysforge.datapipe.sources.file_names import (
    Names,
    ids_of,
    is_structure,
    names_file,
    short_id,
    without_packing,
)
from crysforge.datapipe.sources.files import Files, Zip, open_files
from crysforge.datapipe.sources.labels import (
    LabelTable,
    by_split,
    of_split,
    read_table,
    split_of,
)
from crysforge.datapipe.sources.passed_over import no_crystals, tell
from crysforge.datapipe.storage.manifest import SPLITS

_MOST_TABLES = 20
"""Tables that are looked into for labels."""


def _likes(look: Look) -> int:
    if look.path.is_dir() or look.suffix in (".zip", ".tar"):
        return MAYBE
    return MAYBE if is_structure(look.path.name) else NO


def _splits(path: Path, options: Options) -> bool:
    files = open_files(path, options.follow_links)
    if files is None or options.labels:
        return False
    names = _tables(files) if any(map(is_structure, files.names)) else _data(files)
    return bool(by_split(names))


@SOURCES.register("folder", _likes, splits=_splits)
def read_folder(path: Path, options: Options) -> Iterator[Raw]:
    """A folder (searched through), `.zip` or `.tar(.gz)` of CIF and POSCAR files, compressed or
    not, or one such file.

    With an `id_prop.csv` (`file,label[,label…]`; the suffix of the file may be left out), or with
    another table in which the labels are that are wanted, the crystals are those that it lists, in
    its order (in a tar: in the archive's). Tables of train, val and test (`id_prop_train.csv`, …)
    make the splits. Without a table, all files are taken, sorted by name and unlabelled. Ids are
    file names without suffix; `a/POSCAR` has the id `a`; where names repeat, paths.

    A folder without such files may hold other files of crystals: one, one for each split, or many
    in JSON or extxyz.
    """
    files = open_files(path, options.follow_links)
    if files is None:
        yield Raw(short_id(path.name), path.name, ("file", str(path)))
        return
    structures = [n for n in files.names if is_structure(n)]
    if not structures:
        yield from _read_data(files, options)
        return
    ids = ids_of(structures)
    tables = [] if options.labels else _choose(files, Names(ids, files.aliases), options)
    tell(files, {*structures, *(t.name for t in tables)}, options)
    if not tables:
        for name, payload in files.payloads():
            yield Raw(ids[name], files.where(name), payload)
    else:
        yield from list_files(files, tables, ids)


def list_files(
    files: Files, tables: Sequence[LabelTable], ids: dict[str, str], rest: bool = True
) -> Iterator[Raw]:
    """The crystals that tables list: their files, with labels and splits. A row without a file is
    bad, so is a second row of the same file; files without a row (unless not `rest`) are left out
    by choice."""
    listed: set[str] = set()
    given: dict[str, Raw] = {}
    for table in tables:
        for row in table.rows:
            at = files.where(row.file or f"{table.name} line {row.line}")
            raw = Raw(row.id, at, ("skip", ("", "")), row.labels, table.split)
            if row.file is None:
                message = f"{table.name} lists {row.key!r}, but there is no such file"
                yield replace(raw, payload=("bad", (message, "missing file")))
            elif row.file in listed:
                message = f"{table.name} lists {row.key!r}, which a row before it lists"
                yield replace(raw, payload=("bad", (message, "duplicate id")))
            elif files.in_order:
                given[row.file] = raw
            else:
                yield replace(raw, payload=files.payload(row.file))
            listed |= {row.file} if row.file else set()
    name = " and ".join(t.name for t in tables)
    unlisted = ("skip", (f"{name} does not list it", "not listed"))
    if files.in_order:
        for file, payload in files.payloads():
            if file in given:
                yield replace(given[file], payload=payload)
            elif rest:
                yield Raw(ids[file], files.where(file), unlisted)
    elif rest:
        for file in ids:
            if file not in listed:
                yield Raw(ids[file], files.where(file), unlisted)


def _tables(files: Files) -> list[str]:
    """Tables that may hold labels, `id_prop` first."""
    found = [n for n in files.names if _suffix(n) in TABLES and not is_structure(n)]
    return sorted(found, key=lambda n: (not _is_id_prop(n), TABLES.index(_suffix(n))))


def _suffix(name: str) -> str:
    return Path(without_packing(name).lower()).suffix


def _is_id_prop(name: str) -> bool:
    return name.rsplit("/", 1)[-1].lower().startswith("id_prop")


def _choose(files: Files, names: Names, options: Options) -> list[LabelTable]:
    """The tables that say which files are crystals of the set, and their labels: one for each split
    where there are such, else `id_prop.csv`, else, if labels are wanted, the one that has them.

    Raises:
        ValueError: several tables could be meant; the only ones have a fault.
    """
    every = _tables(files)
    found: list[LabelTable] = []
    faults: list[ValueError] = []

    def read(name: str) -> LabelTable:
        notes: list[str] = []
        text = decode(files.read(name), notes)
        for note in notes:
            options.note(f"{name}: {note}")
        return read_table(text, name, names, options, options.structure_column)

    splits = by_split(every)
    lists: list[LabelTable] = []
    if splits:
        tables = [of_split(read(name), split) for split, name in sorted(splits.items(), key=_nth)]
        if all(t.found for t in tables):
            if absent := [s for s in SPLITS if s not in splits]:
                options.note(f"no table is of {absent[0]}: that split is empty")
            if any(t.labels for t in tables) or not options.wanted:
                return tables
            lists, every = tables, [n for n in every if n not in splits.values()]
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
    return [_listed_in(t, chosen[0]) for t in lists] if lists and chosen else chosen


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


# Folders of other files


def _data(files: Files) -> dict[str, str]:
    """Files of crystals other than structure files, with the readers that are sure of them."""
    found = {}
    folder = files.path.is_dir()
    for name in files.names if folder or isinstance(files, Zip) else ():
        look = Look(files.path / name)
        if look.suffix in TABLES or look.suffix in (_MANY if folder else _MANY[:-1]):
            for reader in SOURCES:
                if SOURCES[reader].likes(look) == SURE and (look.suffix in TABLES or _looks(look)):
                    found[name] = reader
    return found


_MANY = (".json", ".jsonl", ".ndjson", ".extxyz", ".xyz", ".db")
_SIGNS = ("lattice", "cell", "cif", "structure", "atoms", "Lattice")


def _looks(look: Look) -> bool:
    return look.suffix == ".db" or any(sign in look.head for sign in _SIGNS)


def _names_files(look: Look) -> bool:
    """Whether a table names structure files, wherever they are."""
    return any(names_file(c) for row in sniff(look.head, look.whole)[0][1] for c in row)


def _read_data(files: Files, options: Options) -> Iterator[Raw]:
    data, tables = _data(files), _tables(files) if files.path.is_dir() else []
    if not data and len(tables) == 1 and _names_files(Look(files.path / tables[0])):
        data = {tables[0]: "csv"}
    splits = by_split(data)
    chosen = {n: split_of(n) if splits else None for n in (splits.values() if splits else data)}
    single = {n for n in chosen if Path(n).suffix.lower() not in (".json", ".extxyz", ".xyz")}
    if not chosen:
        raise ValueError(no_crystals(files))
    if not splits and len(chosen) > 1 and single:
        raise ValueError(
            f"{files.path} has several files of crystals ({', '.join(chosen)}): give one as input, "
            "or train=…, val=…, test=…"
        )
    tell(files, set(chosen), options)
    for name, split in chosen.items():
        read: Callable[[Path, Options], Iterator[Raw]] = SOURCES[data[name]].read
        for raw in read(files.path / name, options):
            yield replace(raw, split=split) if split else raw
