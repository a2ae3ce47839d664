"""Opens text files however they are packed and encoded, and keeps what they unpack to in bounds."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from crysforge.datapipe.common.decoding import open_decoded
from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.sources.file_names import PACKED, is_hidden, is_structure

__all__ = ["PACKED", "READ_ERRORS", "check_size", "open_text", "zipped_text"]

_OPENERS: Mapping[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
"""How to open what starts with these bytes, whatever it is called."""
_ZIP, _OLE = b"PK\x03\x04", b"\xd0\xcf\x11\xe0"
"""What zips and new workbooks, and old workbooks, start with."""

WORKBOOKS = (".xlsx", ".xls", ".ods", ".numbers")
SAVE_AS_TEXT = "save its table as CSV (UTF-8) and give that"

MAX_FILE = 1 << 26
"""Bytes of the longest structure file or table in a folder or archive."""
MAX_RATIO = 200
"""How many times its size a compressed file may unpack to, beyond `MAX_FILE`: text comes to 20."""
_ZIPPED = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".tab", ".extxyz", ".xyz")
"""Suffixes of texts that are read out of a zip."""

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


def open_text(path: Path, note: Callable[[str], Any] | None = None) -> TextIO:
    """A text file, compressed (gzip, bzip2, xz, the only file of its kind in a `.zip`) or not, or
    one in a zip (`a.zip/train.csv`), in any encoding; line ends stay as they are.

    Args:
        note: told what a reader should know, such as that the text is Latin-1.

    Raises:
        ValueError: it is a workbook or an archive.
    """

    def tell(text: str) -> None:
        if note is not None:
            note(f"{path.name}: {text}")

    place = _in_zip(path)
    if place is not None:
        packed: BinaryIO = zipfile.ZipFile(place[0]).open(place[1])  # type: ignore  # noqa: SIM115
        return open_decoded(io.BufferedReader(Unpacked(place[0], packed), 1 << 18), tell)
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith((_ZIP, _OLE)):
        raise ValueError(f"{path.name} is a workbook or an archive, no text: {SAVE_AS_TEXT}")
    opener = next((o for begin, o in _OPENERS.items() if start.startswith(begin)), None)
    if opener is None:
        return open_decoded(open(path, "rb"), tell)
    packed = opener(path, "rb")
    return open_decoded(io.BufferedReader(Unpacked(path, packed), 1 << 18), tell)


def check_size(name: str, size: int) -> None:
    """Raises BadCrystal for a file in a folder or archive that no structure fills."""
    if size > MAX_FILE:
        raise BadCrystal(f"{name} has {size} bytes, more than any structure", "too large")


def _in_zip(path: Path) -> tuple[Path, str] | None:
    """The zip, and the name within, of a text in a zip; None for any other path."""
    if path.exists():
        name = zipped_text(path) if path.suffix.lower() == ".zip" else None
        return (path, name) if name else None
    archive = next((parent for parent in path.parents if parent.is_file()), None)
    return (archive, path.relative_to(archive).as_posix()) if archive else None


def zipped_text(path: Path) -> str | None:
    """The one text of crystals in a zip that holds no structure files."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/") and not is_hidden(n)]
    texts = [n for n in names if n.lower().endswith(_ZIPPED)]
    return texts[0] if len(texts) == 1 and not any(map(is_structure, names)) else None
