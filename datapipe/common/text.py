"""From the bytes of a file to its text: compression, byte-order marks, encodings, line ends."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any

MAX_TEXT = 1 << 26
"""Bytes of the longest text that is decoded."""

_PACKED: Mapping[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
"""How to open what starts with these bytes."""

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def decode(data: bytes, notes: list[str] | None = None) -> str:
    """The text in the bytes of a file, with line ends as "\\n" and without a byte-order mark.

    Understands gzip, bzip2 and xz; UTF-8; UTF-16 and UTF-32 by their mark, UTF-16 without one by
    its zero bytes; all else is taken for Windows-1252, the superset of Latin-1 that people mean.

    Args:
        notes: takes a line when the encoding had to be guessed.

    Raises:
        ValueError: damaged or endless compression, or bytes that are no text; says which.
    """
    data = unpack(data)
    text = _decoded(data, notes)
    if "\x00" in text:
        raise ValueError("it holds zero bytes: this is no text file")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def unpack(data: bytes) -> bytes:
    """The content of gzip, bzip2 or xz data, by their first bytes; anything else as it is.

    Raises:
        ValueError: it is damaged, or unpacks to more than `MAX_TEXT` bytes.
    """
    opener = next((o for start, o in _PACKED.items() if data.startswith(start)), None)
    if opener is None:
        return data
    try:
        with opener(io.BytesIO(data), "rb") as file:
            content = file.read(MAX_TEXT + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"its compression is damaged: {error}") from None
    if len(content) > MAX_TEXT:
        raise ValueError(f"it unpacks to more than {MAX_TEXT} bytes: no structure does")
    return content


def _decoded(data: bytes, notes: list[str] | None) -> str:
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return _strict(data[len(mark) :], encoding)
    zeros = data[:64].count(0)
    if zeros and 3 * zeros > len(data[:64]):  # each ASCII letter in UTF-16 has one
        return _strict(data, "utf-16-be" if data[0] == 0 else "utf-16-le")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if notes is not None:
            line = data.count(b"\n", 0, error.start) + 1
            notes.append(f"line {line} is not UTF-8: the text was read as Latin-1")
    return data.decode("cp1252", errors="ignore")  # five bytes have no meaning there


def _strict(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is marked as {encoding}, but is not: {error.reason}") from None
