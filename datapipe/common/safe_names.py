"""Names that users give to properties, made fit for files, tables and configs."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

LONGEST = 200
"""Characters of the longest name."""
_FORBIDDEN = {"Cc": "a control character", "Cs": "half a character", "Zl": "a line separator",
              "Zp": "a paragraph separator"}  # fmt: skip
"""Unicode categories that no name may have."""


def check_names(names: Iterable[str], what: str = "target") -> None:
    """Checks names before anything is made of them. All characters that can be printed are fine,
    also `/`, spaces, brackets, dots, signs and letters of any script.

    Raises:
        ValueError: a name that is empty, longer than `LONGEST`, starts or ends with a space, has a
            control character or line end, or `${`, which configs take for a reference.
    """
    for name in names:
        found = [_FORBIDDEN[c] for c in map(unicodedata.category, name) if c in _FORBIDDEN]
        if not name:
            fault = "is empty"
        elif len(name) > LONGEST:
            fault = f"has {len(name)} characters, {LONGEST} are the most"
        elif found:
            fault = f"has {found[0]}"
        elif name != name.strip():
            fault = "starts or ends with a space"
        elif "${" in name:
            fault = "has ${, which configs take for a reference"
        else:
            continue
        raise ValueError(f"{what} {name[:60]!r} {fault}: rename it")


def file_part(text: str) -> str:
    """A text in characters that every file system and shell takes as they are."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)


def slug(text: str, longest: int = 60) -> str:
    """A text as part of a file's name. Different texts may give the same: see `slugs`."""
    short = file_part(text).strip("-.")
    if short and len(short) <= longest:
        return short
    return f"{short[: longest - 9]}-{_digest(text)}".lstrip("-")


def slugs(texts: Sequence[str], longest: int = 60) -> list[str]:
    """Parts of file names that are all different, on file systems that know no case too. One that
    another text would have as well ends in a hash."""
    found = [slug(text, longest) for text in texts]
    counts = Counter(s.casefold() for s in found)
    return [
        f"{s[: longest - 9]}-{_digest(text)}" if counts[s.casefold()] > 1 else s
        for s, text in zip(found, texts, strict=True)
    ]


def in_markdown(text: str) -> str:
    """A text that Markdown shows as it is, also in a cell of a table."""
    text = re.sub(r"([\\|*`~])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within words they are no marks
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def as_code(text: str, in_table: bool = False) -> str:
    """A text as Markdown shows code."""
    text = text.replace("|", r"\|") if in_table else text
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
