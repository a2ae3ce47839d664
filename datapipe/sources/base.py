"""What a source is: a function from a path to cheap raw records, registered by name.

A reader only cuts a file into records (`Raw`); `datapipe.sources.parse` turns their payload into
crystals, in worker processes. To add a source, put one file into this package:

    @SOURCES.register("mine", lambda look: SURE if look.suffix == ".mine" else NO)
    def read_mine(path: Path, options: Options) -> Iterator[Raw]:
        for i, text in enumerate(path.read_text().split("---")):
            yield Raw(f"{path.stem}-{i}", f"{path.name} part {i}", ("text", text), {})
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.crystals.limits import Limits
from crysforge.datapipe.sources.delimited import clean, same_column, sniff
from crysforge.datapipe.sources.texts import PACKED, open_text, zipped_text

Payload = tuple[str, Any]
"""(kind, data): what `datapipe.sources.parse` makes a crystal of. Data is plain and picklable."""

ID_NAMES = (
    "material_id", "jid", "id", "MaterialId", "mp_id", "mpid", "entry_id", "ID", "uid",
    "sample_id", "structure_id", "crystal_id", "mat_id", "cif_id", "identifier", "sample",
)  # fmt: skip
"""Fields that hold the id of a record, the likeliest first."""

NO, MAYBE, SURE = 0, 1, 2
"""How much a file looks like a source's own."""

TABLES = (".csv", ".tsv", ".tab", ".txt", ".dat", ".data")
"""Suffixes of tables as text."""

_HEAD = 1 << 16
"""Characters of a look at the start of a text."""


@dataclass(frozen=True)
class Raw:
    """One crystal as a reader found it."""

    id: str
    where: str
    """File and place in it, for messages: `mp20.csv row 17`."""
    payload: Payload
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Label values as they stand in the file; numbers, text or None."""
    split: str | None = None
    """The split it belonged to, where the source has splits."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may tell a reader; each reader takes what concerns it."""

    id_column: str | None = None
    """Column or field of the id; None: the first of `ID_NAMES` that exists."""
    structure_column: str | None = None
    """Column or field of the structure; None: guessed."""
    targets: tuple[str, ...] = ()
    """Labels that are wanted: names of the columns of a table without a header, in order."""
    checks: str = "strict"
    """What to do with a file that contradicts itself: "strict" refuses it, "warn" says so."""
    wanted: tuple[str, ...] = ()
    """All labels that are looked at, for filters too."""
    labels: str | None = None
    """A table of labels for the records of another file."""
    follow_links: bool = False
    """Whether to read what lies outside of the input, where a link or a table leads to it."""
    prefix: str | None = None
    """Start of the ids of records without one (`<prefix>-<number>`); None: the file's name."""
    max_atoms: int = Limits.atoms
    """Atoms of the largest crystal to read."""
    size: int = 1000
    """Number of synthetic crystals (`prototypes`)."""
    seed: int = 0
    """Seed of synthetic crystals (`prototypes`)."""
    notes: list[str] = field(default_factory=list, compare=False)
    """What a reader has to say about the input, for people; each once."""

    def note(self, text: str) -> None:
        """Adds a note."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Look:
    """What can be seen of an input without reading it all."""

    path: Path

    @cached_property
    def suffix(self) -> str:
        """Last suffix in lower case, without that of the compression; that of the JSON file in a
        zip of one; empty for a directory."""
        if self.path.is_dir():
            return ""
        name = self.path.name.lower()
        for packed in PACKED:
            name = name.removesuffix(packed)
        if name.endswith(".zip"):
            name = inner.lower() if (inner := zipped_text(self.path)) else name
        return ".tar" if name.endswith((".tar", ".tgz")) else Path(name).suffix

    @cached_property
    def head(self) -> str:
        """First 64 KiB of text; empty for directories and archives of many files."""
        if self.path.is_dir() or self.suffix in (".tar", ".zip"):
            return ""
        with open_text(self.path) as file:
            return file.read(_HEAD)

    @property
    def whole(self) -> bool:
        """Whether the head is all of it."""
        return len(self.head) < _HEAD

    @cached_property
    def columns(self) -> list[str]:
        """Names in the first row of a table."""
        if self.suffix not in TABLES:
            return []
        rows = sniff(self.head, self.whole)[0][1]
        return [clean(cell) for cell in rows[0]] if rows else []

    @cached_property
    def names(self) -> list[str]:
        """Some of the files in a directory (two levels deep) or archive."""
        if self.path.is_dir():
            inside = (p for g in ("*", "*/*") for p in self.path.glob(g) if p.is_file())
            return [p.relative_to(self.path).as_posix() for p in islice(inside, 1000)]
        if self.suffix == ".zip":
            with zipfile.ZipFile(self.path) as archive:
                return archive.namelist()
        if self.suffix == ".tar":
            with tarfile.open(self.path) as tar:
                return [m.name for m in islice(tar, 100)]
        return []


Reader = Callable[[Path, Options], Iterator[Raw]]


@dataclass(frozen=True)
class Source:
    """A reader and how to recognise its files."""

    read: Reader
    likes: Callable[[Look], int]
    splits: Callable[[Path, Options], bool]
    """Whether an input says which split its records belong to."""
    files: Callable[[Path, Options], list[Path]]
    """Files outside of the input that it reads as well."""


class Sources:
    """Readers by name."""

    def __init__(self) -> None:
        self._items: dict[str, Source] = {}

    def register(
        self,
        name: str,
        likes: Callable[[Look], int] = lambda look: NO,
        splits: Callable[[Path, Options], bool] = lambda path, options: False,
        files: Callable[[Path, Options], list[Path]] = lambda path, options: [],
    ):
        """Function decorator: makes a reader available as `format=name`. `likes` says how much an
        input looks like its own: `NO`, `MAYBE` or `SURE`; the others are as of `Source`."""

        def add(read: Reader) -> Reader:
            if name in self._items:
                raise ValueError(f"source {name!r} is registered twice")
            self._items[name] = Source(read, likes, splits, files)
            return read

        return add

    def __iter__(self):
        return iter(sorted(self._items))

    def __getitem__(self, name: str) -> Source:
        if name not in self._items:
            raise ValueError(f"unknown format {name!r}: {nearest(name, self._items)}")
        return self._items[name]


SOURCES = Sources()


def numbered(path: Path, number: int, options: Options) -> str:
    """The id of a record that has none: `perov5_val-17` for the 17th of `perov5_val.csv.gz`. Number
    0 stands for the only one: its id is the file's name."""
    name = path.name
    if options.prefix is not None:
        return f"{options.prefix}-{number or 1}"
    while (suffix := os.path.splitext(name)[1].lower()) in {*PACKED, ".zip"}:
        name = name[: -len(suffix)]
    stem = os.path.splitext(name)[0]
    return f"{stem}-{number}" if number else stem


def pick_id(fields: Iterable[str], options: Options, where: str) -> str | None:
    """The field that holds ids: the one asked for, else the likeliest; None if there is none.

    Raises:
        ValueError: the one asked for does not exist.
    """
    names = list(fields)
    if options.id_column is None:
        return _likely_id(tuple(names))
    found = same_column(options.id_column, names)
    if found is None:
        raise ValueError(
            f"{where} has no id column {options.id_column!r}: {nearest(options.id_column, names)}"
        )
    return found


@lru_cache(maxsize=256)
def _likely_id(names: tuple[str, ...]) -> str | None:
    exact = next((n for n in ID_NAMES if n in names), None)
    return exact or next((f for n in ID_NAMES if (f := same_column(n, names))), None)
