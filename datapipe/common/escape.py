"""Text from data where it could mean something: in Markdown, spreadsheets, TensorBoard and names of
files. Ids, names and units come from strangers' files."""

from __future__ import annotations

import hashlib
import re

_MARKS = re.compile(r"[\\`*\[\]~|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|<(?=[A-Za-z/!?])|&(?=#?\w+;)")
"""What is markup anywhere in a line; what is markup only where a line starts never starts one."""
_FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")
"""What spreadsheets take for a formula, or would if it lost its apostrophes."""
_NUMBER = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|inf)")


def one_line(text: str) -> str:
    """A text on one line, with what cannot be printed (line ends, terminal codes, marks that turn
    the direction of writing) as `\\u202e`."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """A text of one line or more for a terminal, with what would steer it as `\\u001b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\xa0\n" else _code(c) for c in text)


def _code(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}"


def markdown(text: str) -> str:
    """A text within a line or table cell of Markdown, shown as it is: no markup, links, images or
    HTML, no new line."""
    text = _MARKS.sub(lambda mark: _MARKUP.get(mark[0], f"\\{mark[0]}"), one_line(text))
    return text.replace("$", "\\$") if text.count("$") > 1 else text  # two make a formula


_MARKUP = {"<": "&lt;", "&": "&amp;"}


def code_span(text: str) -> str:
    """A text as code within a line or table cell of Markdown."""
    text = one_line(text)
    if not text.strip() or "|" in text:  # a table takes it for the end of a cell, in code too
        return markdown(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"{fence}{text}{fence}"


def code_block(text: str, language: str) -> str:
    """A text of many lines as a block of code, whose end it cannot hold."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def cell(text: str) -> str:
    """A text as a cell of a CSV that spreadsheets show, not compute: with an apostrophe before
    what they take for a formula. Numbers stay numbers; `from_cell` gives the text back."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def from_cell(text: str) -> str:
    """The text that `cell` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def tag(text: str) -> str:
    """A name of a curve or figure as TensorBoard may have it: letters, digits and `_-/. ()`; other
    characters as their code point."""
    return re.sub(r"[^\w\-/. ()]", lambda c: f"%{ord(c[0]):02x}", one_line(text))[:200]


def file_part(text: str) -> str:
    """A text as one part of a file's name: letters, digits and `._+-`, no dot or dash first, short.
    Texts that this changes end in a hash, so that no two share a name."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).lstrip(".-")
    if plain == text and len(text) <= 80:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return "-".join(filter(None, (plain[:80], digest)))


def brief(value: object, bare: bool = False) -> str:
    """A value on one short line; `bare`: a text without quotes."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'a mapping'} of {len(value)}"
    if isinstance(value, int) and abs(value) > 1 << 64:
        return "a number beyond all bounds"
    text = value if bare and isinstance(value, str) else repr(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 100 else f"{text[:99]}…"
