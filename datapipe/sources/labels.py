"""Tables of labels: which files they list, and what they say of each."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.sources.base import ID_NAMES, Options
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
from crysforge.datapipe.sources.file_names import Names, is_structure, short_id
from crysforge.datapipe.sources.values import is_number

_FILE_NAMES = ("file", "filename", "file name", "path", "cif", "cif file", "name", "structure")
"""Names, as `plain` gives them, of columns that hold files; they go before others."""
_LIKELY = frozenset(map(plain, (*ID_NAMES, *_FILE_NAMES)))
_SAMPLE = 500
"""Rows that are looked at for the column of files, unless it has none of them."""
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Row:
    """What a table says of one crystal."""

    key: str
    """What it calls it."""
    file: str | None
    """The file that this is; None if there is none."""
    id: str
    labels: Mapping[str, str]
    line: int
    """Place in the table, from 1."""


@dataclass(frozen=True)
class LabelTable:
    """A table that lists crystals and their labels.

    Attributes:
        name: of its file, for messages.
        column: name, or number, of the column that names the crystals.
        labels: names of the label columns.
    """

    name: str
    column: str
    labels: Sequence[str]
    rows: Sequence[Row]
    files: int
    """How many files there are."""
    headed: bool
    """Whether its labels have names of their own."""
    split: str | None = None
    """The split that it lists, where there is a table for each."""

    @property
    def found(self) -> int:
        """How many files it lists."""
        return len({row.file for row in self.rows} - {None})

    def fits(self) -> bool:
        """Whether it is about these files: at least half of its rows are some of them, or it lists
        half of them."""
        return self.found > 0 and 2 * self.found >= min(len(self.rows), self.files)


def read_table(
    text: str, name: str, files: Names, options: Options, column: str | None = None
) -> LabelTable:
    """Reads a table of labels, with any separator, with or without a header. The column of file
    names or ids is the one that matches the most files; `targets` names the others where there is
    no header.

    Args:
        text: of the table. name: of its file, relative to where the files are.
        column: name of the column of files; None finds it. A table without a header has no names.
            `options.id_column` names that of ids, where it is another.

    Raises:
        ValueError: an empty table, rows of unequal length, two columns of one name, no such
            column, or another number of label columns than targets.
    """
    dialect, rows = _without_remark(*_cut(text, name, files), options.wanted)
    place = _named_column(rows[0], column, name) if column else None
    keys = [_column(rows, place)] if place is not None else _columns(rows)
    folder = name.rpartition("/")[0]
    best, found = _best(rows[0], keys, files, folder)
    place = best if place is None else place
    key = _column(rows, place)
    headed = column is not None or _has_header(rows, place, found)
    width = len(rows[0])
    for line, row in enumerate(rows, start=1 + dialect.skip):
        if len(row) != width:
            raise ValueError(
                f"{name} line {line} has {len(row)} fields, line {1 + dialect.skip} has {width}: "
                "quote what holds a "
                f"{dialect.separator!r}"
            )
    names = header(rows[0], name) if headed else []
    labels = _label_names(names, rows, place, name, options) if headed or width > 1 else {}
    ids = _ids(names, rows, place, options, name) if headed else {}
    values = Values(dialect, name, options.wanted)
    listed = [
        Row(
            key[i],
            found[i],
            ids.get(i) or _id(key[i], found[i], files),
            {label: values.read(label, rows[i][j]) for j, label in labels.items()},
            i + 1 + dialect.skip,
        )
        for i in range(headed, len(rows))
    ]
    values.close()
    shown = names[place] if headed and names[place] else str(place + 1)
    return LabelTable(name, shown, list(labels.values()), listed, len(files.ids), headed)


def split_of(name: str) -> str | None:
    """The split that a file is of by its name: `id_prop_train.csv`, `val.csv`."""
    words = re.split(r"[^a-z]+", name.rsplit("/", 1)[-1].lower())
    splits = [s for s, known in _SPLIT_WORDS.items() if any(w in known for w in words)]
    return splits[0] if len(splits) == 1 else None


def by_split(names: Iterable[str]) -> dict[str, str]:
    """Files by the split that each is of, where there is a `train` and another, and one of each;
    else nothing."""
    found: dict[str, str] = {}
    for name in names:
        split = split_of(name)
        if split and found.setdefault(split, name) != name:
            return {}
    return found if "train" in found and len(found) > 1 else {}


def of_split(table: LabelTable, split: str) -> LabelTable:
    """The same table as that of a split."""
    return replace(table, split=split)


def _cut(text: str, name: str, files: Names) -> tuple[Dialect, list[list[str]]]:
    """The rows of a table as the dialect cuts them that gives the most names of files."""
    best: tuple[int, Dialect] | None = None
    for dialect, sample in sniff(text[: 1 << 16], len(text) < 1 << 16):
        known = max((_matched(keys, files) for keys in _columns(sample)), default=0)
        if best is None or known > best[0]:
            best = known, dialect
    assert best is not None
    dialect = best[1]
    lines = io.StringIO(text, newline="")
    try:
        rows = [[clean(cell) for cell in row] for row in dialect.rows(lines)]
    except csv.Error as error:
        raise ValueError(f"{name}: {error}") from None
    if not rows:
        raise ValueError(f"{name} is empty: it must hold lines 'file,label'")
    width = len(rows[0])
    return dialect, [trim(row, width) for row in rows]


def _without_remark(
    dialect: Dialect, rows: list[list[str]], wanted: Sequence[str]
) -> tuple[Dialect, list[list[str]]]:
    """A table without a first line that starts with # and names nothing that is wanted."""
    names = [cell.lstrip("# ") for cell in rows[0]]
    remark = rows[0][0].startswith("#") and not any(same_column(w, names) for w in wanted)
    if remark and wanted and len(rows) > 1:
        return replace(dialect, skip=dialect.skip + 1), rows[1:]
    return dialect, rows


def _named_column(names: Sequence[str], column: str, where: str) -> int:
    found = same_column(column, names)
    if found is None:
        raise ValueError(
            f"{where} has no column {column!r}: {nearest(column, filter(None, names))}"
        )
    return list(names).index(found)


def _columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [_column(rows, i) for i in range(len(rows[0]))] if rows else []


def _column(rows: Sequence[Sequence[str]], place: int) -> list[str]:
    return [row[place] if place < len(row) else "" for row in rows]


def _matched(keys: Sequence[str], files: Names, folder: str = "") -> int:
    return len(set(files.match(keys, folder)) - {None})


def _best(
    names: Sequence[str], columns: Sequence[list[str]], files: Names, folder: str
) -> tuple[int, list[str | None]]:
    """(number, file of each row) of the column that lists the most files; of several, the one with
    a likely name, or the first."""

    def score(place: int, keys: Sequence[str]) -> tuple[int, int, int]:
        named = len(columns) > 1 and plain(names[place]) in _LIKELY
        return _matched(keys, files, folder), named, -place

    sample = [score(i, list(islice(keys, _SAMPLE))) for i, keys in enumerate(columns)]
    if not max(sample)[0]:
        sample = [score(i, keys) for i, keys in enumerate(columns)]
    best = sample.index(max(sample))
    return best, files.match(columns[best], folder)


def _has_header(rows: Sequence[Sequence[str]], place: int, files: Sequence[str | None]) -> bool:
    """Whether the first row names the columns: it is no file, and has words where others have
    numbers."""
    if files[0] is not None or len(rows) < 2 or is_structure(rows[0][place]):
        return False
    if rows[0][0].startswith("#") or plain(rows[0][place]) in _LIKELY:
        return True
    numeric = [
        i
        for i in range(len(rows[0]))
        if i != place and all(map(is_number, cells := _column(rows, i)[1:])) and any(cells)
    ]
    if numeric:
        return any(not is_number(rows[0][i]) for i in numeric)
    return None not in files[1:]


def _label_names(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    place: int,
    where: str,
    options: Options,
) -> dict[int, str]:
    """Names of the label columns by their numbers."""
    others = [i for i in range(len(rows[0])) if i != place and any(row[i] for row in rows)]
    if names:
        return {i: names[i] for i in others if names[i]}
    if not options.targets:
        single = len(others) == 1
        return {i: "target" if single else f"target_{n}" for n, i in enumerate(others, start=1)}
    if len(others) != len(options.targets):
        numbers = [i for i in others if all(is_number(row[i]) for row in rows if len(row) > i)]
        if len(numbers) != len(options.targets):
            raise ValueError(
                f"{where} has {len(others)} label column(s) without names, targets names "
                f"{len(options.targets)}: name each column once, in order, or in a first line"
            )
        others = numbers
    return dict(zip(others, options.targets, strict=True))


def _ids(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    place: int,
    options: Options,
    where: str,
) -> dict[int, str]:
    """Ids by row, where a column beside that of the files is one of ids."""
    if options.id_column is not None:
        other = _named_column(names, options.id_column, where)
        return dict(enumerate(_column(rows, other)[1:], start=1)) if other != place else {}
    known = [plain(n) for n in names]
    likely = [known.index(p) for p in map(plain, ID_NAMES) if p in known]
    other = next((i for i in likely if i != place), -1)
    if other < 0 or place in likely[: likely.index(other)]:
        return {}
    ids = _column(rows, other)[1:]
    unique = all(ids) and len(set(ids)) == len(ids)
    return dict(enumerate(ids, start=1)) if unique else {}


def _id(key: str, file: str | None, files: Names) -> str:
    """The id of a row's crystal: what the table calls it, unless that is a path."""
    if is_structure(key) or "/" in key or "\\" in key:
        return files.ids[file] if file is not None else short_id(key.replace("\\", "/"))
    return key
