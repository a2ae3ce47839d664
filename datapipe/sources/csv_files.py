"""Tables with a crystal in every row: its structure as text (the CDVAE layout, OQMD's export), or
the name of its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.sources.base import (
    MAYBE,
    NO,
    SOURCES,
    SURE,
    TABLES,
    Look,
    Options,
    Payload,
    Raw,
    numbered,
    pick_id,
)
from crysforge.datapipe.sources.delimited import (
    Dialect,
    Values,
    clean,
    header,
    plain,
    same_column,
    sniff,
    trim,
)
from crysforge.datapipe.sources.file_names import is_structure, names_file
from crysforge.datapipe.sources.named_files import finds_files, read_named
from crysforge.datapipe.sources.texts import open_text

TEXT_NAMES = ("cif", "structure", "poscar", "POSCAR", "cif_string", "atoms")
"""Columns that hold a structure, the likeliest first."""
_MORE_NAMES = (
    "contcar", "cif text", "cif str", "cifs", "crystal structure", "structure cif", "crystal",
    "cif file", "cif path", "cif name", "structure file", "structure path", "file", "filename",
    "file name", "filepath", "file path", "path",
)  # fmt: skip
_OQMD = ("unit_cell", "sites")


@dataclass(frozen=True)
class _Layout:
    """How a table is laid out."""

    dialect: Dialect
    names: Sequence[str]
    """Of its columns."""
    headed: bool
    """Whether its first row has them."""
    structure: tuple[int, ...]
    """Columns of the structure."""
    id: int | None
    """Column of ids."""


def _likes(look: Look) -> int:
    if look.suffix not in TABLES or is_structure(look.path.name):
        return NO
    tables = (rows for _, rows in sniff(look.head, look.whole))
    if _named(look.columns) or any(_is_text(c) for rows in tables for row in rows for c in row):
        return SURE
    return NO if look.suffix in (".dat", ".data") else MAYBE


def _files(path: Path, options: Options) -> list[Path]:
    """The structure files that a table names."""
    if _layout(path, options) is not None:
        return []
    payloads = (raw.payload for raw in read_named(path, options))
    return [Path(data) for kind, data in payloads if kind == "file"]


@SOURCES.register("csv", _likes, files=_files)
def read_csv(path: Path, options: Options) -> Iterator[Raw]:
    """A table (`.csv`, `.tsv`, `.txt`; compressed or not) with one crystal per row, its columns
    separated by commas, semicolons, tabs, bars or spaces.

    The structure is CIF, POSCAR or JSON text in a column (`cif`, or `structure_column`), or OQMD's
    `unit_cell` and `sites`; or a column holds the names of structure files, relative to the table,
    or ids that such files beside it have. All other columns are labels. Without an id column, ids
    are `<file>-<row>`, or those of the files.
    """
    layout = _layout(path, options)
    if layout is None:
        yield from read_named(path, options)
        return
    with open_text(path, options.note) as file:
        yield from _rows(file, layout, path, options)


def _named(names: Sequence[str]) -> tuple[int, ...]:
    """The columns of the structure by their names."""
    if set(_OQMD) <= set(names):
        return tuple(names.index(n) for n in _OQMD)
    return next(iter(_candidates(names)), ())


def _candidates(names: Sequence[str]) -> list[tuple[int]]:
    exact = [n for n in TEXT_NAMES if n in names]
    alike = [f for n in (*TEXT_NAMES, *_MORE_NAMES) if (f := same_column(n, names))]
    return [(list(names).index(n),) for n in dict.fromkeys([*exact, *alike])]


def _layout(path: Path, options: Options) -> _Layout | None:
    """How a table with structures is laid out; None where they are files.

    Raises:
        ValueError: an empty table, or columns that are asked for and not there.
    """
    look = Look(path)
    if not look.head.strip():
        raise ValueError(f"{path.name} is empty: the first line must name the columns")
    if look.head.lstrip().startswith(("[{", "[\n", "[\r", '{"')):
        raise ValueError(f"{path.name} holds JSON: give format=json")
    if "\0" in look.head:
        raise ValueError(f"{path.name} holds zero bytes: this is no table as text")
    for dialect, sample in sniff(look.head, look.whole):
        if len(sample) > 1 and sample[0][0].startswith("#") and _named(list(map(clean, sample[1]))):
            dialect, sample = replace(dialect, skip=dialect.skip + 1), sample[1:]  # a remark
        row = sample[0] if sample else []
        texts = tuple(i for i, cell in enumerate(row) if _is_text(cell))
        if texts:
            return _headless(path.name, dialect, len(row), texts[:1], options)
        names = [clean(cell) for cell in row]
        structure = _structure(names, sample[1:], path.name, options)
        unlike = structure and sample[1:] and not _holds(sample[1:], structure[0], _is_structure)
        if unlike and finds_files(path, options):
            return None
        if structure:
            names = header(row, path.name)
            id_name = pick_id(filter(None, names), options, path.name)
            place = names.index(id_name) if id_name else None
            return _Layout(dialect, names, True, structure, None if place in structure else place)
    return None


def _structure(
    names: Sequence[str], rows: Sequence[Sequence[str]], where: str, options: Options
) -> tuple[int, ...]:
    """The columns of the structure's text: the one that is asked for, the likeliest by name, or the
    only one that holds such; none where structures are files."""
    if options.structure_column is not None:
        column = same_column(options.structure_column, names)
        if column is None:
            known = nearest(options.structure_column, filter(None, names))
            raise ValueError(
                f"{where} has no structure column {options.structure_column!r}: {known}"
            )
        place = list(names).index(column)
        return () if _holds(rows, place, names_file) else (place,)
    if set(_OQMD) <= set(names):
        return _named(names)
    candidates = [place for (place,) in _candidates(names)]
    texts = [i for i in candidates if _holds(rows, i, _is_text)]
    texts = texts or [i for i in range(len(names)) if _holds(rows, i, _is_text)][:1]
    if texts:
        return (texts[0],)
    if any(_holds(rows, i, names_file) for i in range(len(names))):
        return ()
    likely = [i for i in candidates if names[i] in TEXT_NAMES or plain(names[i]) in TEXT_NAMES]
    return (likely[0],) if likely else ()


def _holds(rows: Sequence[Sequence[str]], place: int, kind: Callable[[str], bool]) -> bool:
    """Whether at least half of the cells of a column that are not empty are of a kind."""
    cells = [row[place] for row in rows if len(row) > place and row[place].strip()]
    return bool(cells) and 2 * sum(map(kind, cells)) >= len(cells)


def _headless(
    where: str, dialect: Dialect, width: int, structure: tuple[int, ...], options: Options
) -> _Layout:
    """The layout of a table without a header: id if there is one, structure, labels in order."""
    others = [i for i in range(width) if i not in structure]
    spare = len(others) - len(options.targets)
    if options.targets and spare not in (0, 1):
        raise ValueError(
            f"{where} has no header and {len(others)} columns beside the structure, for an id and "
            f"{len(options.targets)} target(s): name the columns in a first line"
        )
    id = others.pop(0) if others and spare else None
    given = options.targets or [f"target_{n}" for n in range(1, 1 + len(others))]
    names = [""] * width
    for i, name in zip(others, given, strict=True):
        names[i] = name
    return _Layout(dialect, names, False, structure, id)


def _is_structure(cell: str) -> bool:
    return _is_text(cell) or cell.lstrip().startswith("[")  # as OQMD's cells do


def _is_text(cell: str) -> bool:
    """Whether a cell holds a structure, as far as can be seen."""
    cell = cell.lstrip()
    if cell.startswith(("{", "data_")) or "_cell_length_a" in cell:
        return len(cell) > 40
    return cell.count("\n") + cell.count("\r") > 6


def _rows(file: TextIO, layout: _Layout, path: Path, options: Options) -> Iterator[Raw]:
    rows = layout.dialect.rows(file)
    if layout.headed:
        next(rows, None)
    width = len(layout.names)
    used = {*layout.structure, layout.id}
    labels = [(i, n) for i, n in enumerate(layout.names) if n and i not in used]
    wanted = {plain(name) for name in options.wanted}
    looked_at = [(i, n) for i, n in labels if plain(n) in wanted]
    values = Values(layout.dialect, path.name, options.wanted)
    for number, full in enumerate(rows, start=1):
        where, row = f"{path.name} row {number}", trim(full, width)
        if len(row) == width:
            payload = text_payload([row[i] for i in layout.structure])
        else:
            payload = ("bad", (f"{len(row)} fields, the header has {width}", "unreadable"))
            row += [""] * (width - len(row))
        record = {name: row[i] for i, name in labels}
        for i, name in looked_at:
            record[name] = values.read(name, row[i])
        if layout.id is None:
            found = numbered(path, number, options)
        else:
            found = clean(row[layout.id])
        yield Raw(found, where, payload if found else NO_ID, record)
    values.close()


NO_ID: Payload = ("bad", ("the record has an empty id", "no id"))


def text_payload(values: Sequence[Any]) -> Payload:
    """The payload for the values of a record's structure fields."""
    if len(values) == 2:
        return "oqmd", {"unit_cell": values[0], "sites": values[1]}
    value = values[0]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return "json", value
    if isinstance(value, str):
        return "text", "\n".join(value.splitlines()) + "\n" if "\r" in value else value
    if isinstance(value, Mapping):
        return ("structure" if "sites" in value else "atoms"), value
    return "bad", (f"no structure: found {str(value)[:40]!r}", "unreadable")
