"""A tar as the library may read it: entries that hold what is there, and no more."""

from __future__ import annotations

from typing import BinaryIO

BLOCK = 512
"""Bytes that tars are counted in."""
MAX_ENTRY = 1 << 28
"""Bytes of the longest record: far more than 20,000 atoms and their graphs take."""
_PLAIN = (b"0", b"\0")
"""Types of regular files."""


class PlainEntries:
    """Passes a tar on up to the first entry that is no regular file; there it ends.

    A compressed or sparse entry of a few bytes can claim any number of them, which the reader would
    have to find memory for; a header of an extended format can make an entry sparse. Data sets have
    neither.

    Args:
        stream: at the start of a header.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._content = 0
        """Bytes to the next header."""
        self._ended = False

    def read(self, size: int) -> bytes:
        """The next bytes: a multiple of `BLOCK`, as tars are read, or all that are left."""
        data = b"" if self._ended else self._stream.read(size)
        at = 0
        while self._content + at < len(data):
            at += self._content
            content = _content(data[at : at + BLOCK])
            if content is None:
                self._ended = True
                return data[:at]
            at, self._content = at + BLOCK, content
        self._content -= len(data) - at
        return data


def _content(header: bytes) -> int | None:
    """Bytes from a header to the next; None if it is not that of a record or of the end."""
    if not header.strip(b"\0"):
        return 0
    digits = header[124:136].strip(b" \0")
    if header[156:157] not in _PLAIN or not digits.isdigit():
        return None
    try:
        size = int(digits, 8)
    except ValueError:
        return None
    return -(-size // BLOCK) * BLOCK if size <= MAX_ENTRY else None
