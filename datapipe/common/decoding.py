"""Text files too large for memory, in whatever encoding they are: UTF-8, UTF-16 or UTF-32, with or
without a byte-order mark; bytes that are none of them are Latin-1."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable
from typing import Any, BinaryIO, TextIO

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LOOKED_AT = 4096
"""Bytes at the start that tell an encoding without a byte-order mark."""
_FOREIGN = "crysforge-latin-1"
"""Name of the codecs' error handler that reads bytes which are no UTF-8 as Latin-1."""


class Decoder:
    """Decodes a text piece by piece.

    Attributes:
        encoding: as the start of the text says.
        foreign: number of the first line with bytes that are no UTF-8, which were read as Latin-1
            (Windows-1252); None if there is none.
    """

    def __init__(self) -> None:
        self.encoding = ""
        self.foreign: int | None = None
        self._held = b""
        self._lines = 0
        self._decoder: codecs.IncrementalDecoder | None = None

    def feed(self, data: bytes, final: bool = False) -> str:
        """The text of the next bytes; `final` says that no more come."""
        data, self._held = self._held + data, b""
        if not self.encoding:
            if len(data) < 4 and not final:
                self._held = data
                return ""
            mark, self.encoding = _encoding(data[:_LOOKED_AT])
            data = data[len(mark) :]
            if self.encoding != "utf-8":
                self._decoder = codecs.getincrementaldecoder(self.encoding)("replace")
        if self._decoder is not None:
            return self._decoder.decode(data, final)
        try:
            text, used = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as error:
            text, used = codecs.utf_8_decode(data, _FOREIGN, final)
            if self.foreign is None:
                self.foreign = 1 + self._lines + _ends(data[: error.start])
        if self.foreign is None:
            self._lines += _ends(data[:used])
        self._held = data[used:]
        return text


def open_decoded(stream: BinaryIO, note: Callable[[str], Any] | None = None) -> TextIO:
    """A stream of bytes as text, with line ends as they are. `note` is told once if bytes are read
    as Latin-1, as in "line 30 is not UTF-8: read as Latin-1"."""
    return io.TextIOWrapper(
        io.BufferedReader(_Utf8(stream, note), 1 << 18), encoding="utf-8", newline=""
    )


class _Utf8(io.RawIOBase):
    """A stream's text as UTF-8."""

    def __init__(self, stream: BinaryIO, note: Callable[[str], Any] | None) -> None:
        self._stream, self._note = stream, note
        self._decoder = Decoder()
        self._ready = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            data = self._stream.read(len(buffer))
            self._ended = not data
            text = self._decoder.feed(data, final=self._ended)
            self._ready = memoryview(text.encode("utf-8", "replace"))
            if self._decoder.foreign is not None and self._note is not None:
                self._note(f"line {self._decoder.foreign} is not UTF-8: read as Latin-1")
                self._note = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _encoding(start: bytes) -> tuple[bytes, str]:
    """(byte-order mark, encoding) of a text that starts so."""
    for mark, name in _MARKS:
        if start.startswith(mark):
            return mark, name
    even, odd = start[::2].count(0), start[1::2].count(0)
    half = len(start) // 2
    if half and max(even, odd) > 0.4 * half and min(even, odd) < 0.1 * half:
        return b"", "utf-16-be" if even > odd else "utf-16-le"
    return b"", "utf-8"


def _ends(data: bytes) -> int:
    """Line ends in a piece of text: LF, or CR where there is no LF."""
    return data.count(b"\n") or data.count(b"\r")


def _as_latin_1(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    bad = error.object[error.start : error.end]
    text = "".join(
        bytes([b]).decode("cp1252", "ignore") or bytes([b]).decode("latin-1") for b in bad
    )
    return text, error.end


codecs.register_error(_FOREIGN, _as_latin_1)
