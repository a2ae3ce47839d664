"""Folders and archives of structure files, with or without tables of labels, and folders of other
files that hold crystals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

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
from crysforge.datapipe.sources.delimited import sniff
from crysforge.datapipe.sources.file_names import (
    SUFFIXES,
    Names,
    ids_of,
    is_structure,
    names_file,
    short_id,
)
from crysforge.datapipe.sources.files import Files, Zip, open_files
from crysforge.datapipe.sources.labels import LabelTable, by_split, split_of
from crysforge.datapipe.sources.listing import choose_tables, tables_in
from crysforge.datapipe.sources.texts import SAVE_AS_TEXT, WORKBOOKS

_SHOWN = 5
"""Examples of a long list."""


def _likes(look: Look) -> int:
    if look.path.is_dir() or look.suffix in (".zip", ".tar"):
        return MAYBE
    return MAYBE if is_structure(look.path.name) else NO


def _splits(path: Path, options: Options) -> bool:
    files = open_files(path, options.follow_links)
    if files is None or options.labels:
        return False
    structures = [n for n in files.names if is_structure(n)]
    if not structures:
        return bool(by_split(_data(files)))
    tables, _ = choose_tables(files, Names(ids_of(structures), files.aliases), options)
    return any(table.split for table in tables)


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
    names = Names(ids, files.aliases)
    tables, used = ([], set()) if options.labels else choose_tables(files, names, options)
    _tell(files, {*structures, *used}, options)
    _tell_of_split_folders(files, structures, [t.split for t in tables], options)
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


def _tell(files: Files, used: set[str], options: Options) -> None:
    """Notes what is not read."""
    labels = Path(options.labels or "").resolve()
    others = [n for n in files.names if n not in used and (files.path / n).resolve() != labels]
    for what, names in (("other file", others), ("pipe or device", files.no_files)):
        if names:
            options.note(f"not read: {_listed(what, names)}")
    if files.links:
        options.note(f"{_listed('link', files.links)} to what is read anyway: it is read once")
    if files.left_out:
        options.note(f"not followed: {_outside(files)}")


def _tell_of_split_folders(
    files: Files, names: Sequence[str], given: Sequence[str | None], options: Options
) -> None:
    """Notes that folders called train and test say nothing here."""
    if options.prefix or any(given) or not files.path.is_dir():
        return
    inside = dict.fromkeys(n.split("/")[0] for n in names if "/" in n)
    found = {split_of(f"{folder}.csv"): folder for folder in inside}
    if "train" in found and len(found.keys() - {None}) > 1:
        how = " ".join(f"{s}={files.path / f}" for s, f in found.items() if s)
        options.note(f"the folders in it are read as one set; to have them as splits, give {how}")


def _outside(files: Files) -> str:
    remedy = "read them with follow_links=true" if files.path.is_dir() else "unpack it"
    return f"{_listed('link', files.left_out)} out of {files.path.name} or to nothing; {remedy}"


def _listed(what: str, names: Sequence[str]) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    plural = "s" if len(names) > 1 else ""
    return f"{len(names):,} {what}{plural} ({', '.join(names[:_SHOWN])}{more})"


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
    data, tables = _data(files), tables_in(files) if files.path.is_dir() else []
    if not data and len(tables) == 1 and _names_files(Look(files.path / tables[0])):
        data = {tables[0]: "csv"}
    splits = by_split(data)
    chosen = {n: split_of(n) if splits else None for n in (splits.values() if splits else data)}
    single = {n for n in chosen if Path(n).suffix.lower() not in (".json", ".extxyz", ".xyz")}
    if not chosen:
        raise ValueError(_nothing(files))
    if not splits and len(chosen) > 1 and single:
        raise ValueError(
            f"{files.path} has several files of crystals ({', '.join(chosen)}): give one as input, "
            "or train=…, val=…, test=…"
        )
    _tell(files, set(chosen), options)
    for name, split in chosen.items():
        read: Callable[[Path, Options], Iterator[Raw]] = SOURCES[data[name]].read
        for raw in read(files.path / name, options):
            yield replace(raw, split=split) if split else raw


def _nothing(files: Files) -> str:
    """What is wrong with a folder without crystals."""
    text = f"{files.path} holds no structure files ({', '.join(SUFFIXES)}, POSCAR…)"
    if files.left_out:
        return f"{text}; it has {_outside(files)}"
    if workbook := next((n for n in files.names if n.lower().endswith(WORKBOOKS)), None):
        return f"{text}; {workbook} is a workbook: {SAVE_AS_TEXT}"
    if files.no_files:
        return f"{text}; it has {_listed('pipe or device', files.no_files)}"
    if not files.names:
        return text
    text = f"{text}; it has {_listed('other file', files.names)}"
    if not files.path.is_dir():
        return f"{text}: unpack it and give what holds the crystals as input"
    return text
