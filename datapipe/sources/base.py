"""What a source is: a function from a path to cheap raw records, registered by name.

A reader only cuts a file into records (`Raw`); `datapipe.sources.parse` turns their payload into
crystals, in worker processes. To add a source, put one file into this package:

    @SOURCES.register("mine", lambda look: SURE if look.suffix == ".mine" else NO)
    def read_mine(path: Path, options: Options) -> Iterator[Raw]:
        for i, text in enumerate(path.read_text().split("---")):
            yield Raw(f"{path.stem}-{i}", f"{path.name} part {i}", ("text", text), {})
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.crystals.limits import Limits

Payload = tuple[str, Any]
"""(kind, data): what `datapipe.sources.parse` makes a crystal of. Data is plain and picklable."""

ID_NAMES = ("material_id", "jid", "id", "MaterialId", "mp_id", "mpid", "entry_id", "ID", "uid")
"""Fields that hold the id of a record, the likeliest first."""

NO, MAYBE, SURE = 0, 1, 2
"""How much a file looks like a source's own."""


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
    """Names of the label columns of a headerless `id_prop.csv`."""
    prefix: str | None = None
    """Start of the ids of records without one (`<prefix>-<number>`); None: the file's name."""
    max_atoms: int = Limits.atoms
    """Atoms of the largest crystal to read."""
    size: int = 1000
    """Number of synthetic crystals (`prototypes`)."""
    seed: int = 0
    """Seed of synthetic crystals (`prototypes`)."""


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
        for packed in _OPENERS:
            name = name.removesuffix(packed)
        if name.endswith(".zip"):
            name = inner.lower() if (inner := _zipped_text(self.path)) else name
        return ".tar" if name.endswith((".tar", ".tgz")) else Path(name).suffix

    @cached_property
    def head(self) -> str:
        """First 64 KiB of text; empty for directories and archives of many files."""
        if self.path.is_dir() or self.suffix in (".tar", ".zip"):
            return ""
        try:
            with open_text(self.path) as file:
                return file.read(1 << 16)
        except UnicodeDecodeError:
            return ""

    @cached_property
    def columns(self) -> list[str]:
        """Names in the first line of a CSV file."""
        return next(csv.reader(self.head.splitlines()), []) if self.suffix == ".csv" else []

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


class Sources:
    """Readers by name."""

    def __init__(self) -> None:
        self._items: dict[str, Source] = {}

    def register(self, name: str, likes: Callable[[Look], int] = lambda look: NO):
        """Function decorator: makes a reader available as `format=name`. `likes` says how much an
        input looks like its own: `NO`, `MAYBE` or `SURE`."""

        def add(read: Reader) -> Reader:
            if name in self._items:
                raise ValueError(f"source {name!r} is registered twice")
            self._items[name] = Source(read, likes)
            return read

        return add

    def __iter__(self):
        return iter(sorted(self._items))

    def __getitem__(self, name: str) -> Source:
        if name not in self._items:
            raise ValueError(f"unknown format {name!r}: {nearest(name, self._items)}")
        return self._items[name]


SOURCES = Sources()


_OPENERS: Mapping[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}

MAX_FILE = 1 << 26
"""Bytes of the longest structure file or table in a folder or archive."""
MAX_RATIO = 200
"""How many times its size a compressed file may unpack to, beyond `MAX_FILE`: text comes to 20."""

READ_ERRORS = (
    OSError,
    EOFError,
    RecursionError,
    UnicodeDecodeError,
    csv.Error,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
)
"""What a damaged file raises."""


class Unpacked(io.RawIOBase):
    """The bytes that a compressed file holds; raises ValueError where they become too many."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        self._left = MAX_FILE + MAX_RATIO * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(
                f"{self._path.name} unpacks to more than {MAX_RATIO} times its size: no crystals "
                "do; unpack it yourself if you trust it"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_text(path: Path) -> TextIO:
    """A text file, compressed (`.gz`, `.bz2`, `.xz`, the only file of its kind in a `.zip`) or
    not."""
    suffix = path.suffix.lower()
    if suffix == ".zip" and (name := _zipped_text(path)):
        archive = zipfile.ZipFile(path)
        packed: BinaryIO = archive.open(name)  # type: ignore[assignment]
    elif suffix in _OPENERS:
        packed = _OPENERS[suffix](path, "rb")
    else:
        return open(path, encoding="utf-8-sig", newline="")
    unpacked = io.BufferedReader(Unpacked(path, packed), 1 << 18)
    return io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline="")


def check_size(name: str, size: int) -> None:
    """Raises BadCrystal for a file in a folder or archive that no structure fills."""
    if size > MAX_FILE:
        raise BadCrystal(f"{name} has {size} bytes, more than any structure", "too large")


def _zipped_text(path: Path) -> str | None:
    """The one JSON or CSV file in a zip that holds no structure files."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/") and "__MACOSX" not in n]
    texts = [n for n in names if n.lower().endswith((".json", ".csv", ".jsonl"))]
    return texts[0] if len(texts) == 1 and len(names) == 1 else None


def numbered(path: Path, number: int, options: Options) -> str:
    """The id of a record that has none: `perov5_val-17` for the 17th of `perov5_val.csv.gz`."""
    name = path.name
    if options.prefix is not None:
        return f"{options.prefix}-{number}"
    while (suffix := os.path.splitext(name)[1].lower()) in {*_OPENERS, ".zip"}:
        name = name[: -len(suffix)]
    return f"{os.path.splitext(name)[0]}-{number}"


def pick_id(fields: Iterable[str], options: Options, where: str) -> str | None:
    """The field that holds ids: the one asked for, else the likeliest; None if there is none.

    Raises:
        ValueError: the one asked for does not exist.
    """
    names = list(fields)
    if options.id_column is None:
        return next((n for n in ID_NAMES if n in names), None)
    if options.id_column not in names:
        raise ValueError(
            f"{where} has no id column {options.id_column!r}: {nearest(options.id_column, names)}"
        )
    return options.id_column
