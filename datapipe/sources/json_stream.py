"""JSON files too large for memory, record by record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"
_AFTER = ",]}" + _SPACE


class JsonText:
    """Walks through a JSON text; holds no more of it than one value and a buffer.

    Raises ValueError where the text is not JSON or ends too early.
    """

    def __init__(self, stream: TextIO, chunk: int = 1 << 20) -> None:
        self._stream, self._chunk = stream, chunk
        self._text, self._at, self._ended = "", 0, False
        self._looked: tuple[Any, int] | None = None

    def peek(self) -> str:
        """The next character that is no space, empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._fill()

    def value(self) -> Any:
        """Decodes the next value."""
        self.peek()
        if self._looked is not None:
            (found, self._at), self._looked = self._looked, None
            return found
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
                # A number might go on in the next chunk; all else ends with itself.
                whole = not isinstance(found, int | float) or self._text[end : end + 1] in _AFTER
                if (whole and end < len(self._text)) or self._ended:
                    self._at = end
                    return found
            except json.JSONDecodeError as error:
                if self._ended:
                    raise ValueError(f"not complete JSON: {error.msg}") from None
            self._fill()

    def look(self, most: int) -> Any:
        """The next value, an object or list, if it takes at most so many characters, else None;
        nothing is taken."""
        self.peek()
        while True:
            try:
                self._looked = _DECODER.raw_decode(self._text, self._at)
                return self._looked[0]
            except json.JSONDecodeError:
                if self._ended or len(self._text) - self._at > most:
                    return None
            self._fill()

    def items(self) -> Iterator[Any]:
        """Decodes the values of the array that comes next, one by one."""
        self._take("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self._take(",")
        self._take("]")

    def keys(self) -> Iterator[str]:
        """Keys of the object that comes next; the caller takes each value before the next key."""
        self._looked = None
        self._take("{")
        while self.peek() != "}":
            key = str(self.value())
            self._take(":")
            yield key
            if self.peek() != "}":
                self._take(",")
        self._take("}")

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(
                f"not JSON: expected {character!r}, found {self.peek() or 'the end'!r}"
            )
        self._at += 1

    def _fill(self) -> None:
        """Reads on; reads more at a time while one value fills the buffer, so that the work is
        linear in its length."""
        rest = self._text[self._at :]
        more = self._stream.read(max(self._chunk, len(rest)))
        self._text, self._at, self._ended = rest + more, 0, not more
