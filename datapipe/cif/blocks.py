"""CIF text to data blocks, whose tags are found however they are spelt."""

from __future__ import annotations

import re
import sys
from typing import Any

from gemmi import cif

from crysforge.datapipe.crystals.crystal import BadCrystal

_SITE = "_atom_site_fract_x"
_OTHER_SITES = ("_atom_site_cartn_x", "_atom_site_label_atom_id")


class Block:
    """One data block. Tags are asked for in lower case with `_` for every `.` and `-`, so that
    `_space_group.name_H-M_alt` is `_space_group_name_h_m_alt`, as are its other spellings.

    Attributes:
        name: what follows `data_`.
        pairs: raw values outside loops, by tag.
        places: (number of a loop, column) by tag.
        repeated: tags that occur again, with another value or in another loop.
    """

    def __init__(self, source: cif.Block) -> None:
        self.name = source.name.strip()
        self.pairs: dict[str, str] = {}
        self.places: dict[str, tuple[int, int]] = {}
        self.repeated: set[str] = set()
        self._loops: list[cif.Loop] = []
        self._values: dict[int, list[str]] = {}
        items: Any = source
        for item in items:
            if (pair := item.pair) is not None:
                tag, value = _tag(pair[0]), pair[1]
                if tag in self.places:
                    self.repeated.add(tag)
                elif self.pairs.setdefault(tag, value) != value:
                    self._repeat(tag, value)
            elif (loop := item.loop) is not None:
                number = len(self._loops)
                self._loops.append(loop)
                for column, tag in enumerate(map(_tag, loop.tags)):
                    if tag in self.places or tag in self.pairs:
                        self.repeated.add(tag)
                    self.places[tag] = number, column
        self._known = {*self.pairs, *self.places}

    def _repeat(self, tag: str, value: str) -> None:
        """A tag that comes again: what is no value does not count."""
        if cif.as_string(value).strip() and not cif.is_null(value):
            old = self.pairs[tag]
            if cif.as_string(old).strip() and not cif.is_null(old):
                self.repeated.add(tag)
            self.pairs[tag] = value

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags."""
        return (*self.pairs, *self.places)

    def values(self, *tags: str) -> list[str]:
        """The values that the file gives for any of the tags, without `.` and `?`.

        Raises:
            BadCrystal: one of them has several.
        """
        found: list[str] = []
        if self._known.isdisjoint(tags):
            return found
        for tag in tags:
            raw = self.pairs.get(tag)
            if raw is None:
                if tag not in self.places or len(column := self.column(tag)) != 1:
                    continue
                raw = column[0]
            self._check(tag)
            if raw.startswith(QUOTES):
                raw = cif.as_string(raw)
            if raw not in NULLS and (text := raw.strip()):
                found.append(text)
        return found

    def value(self, *tags: str) -> str | None:
        """The first of `values`."""
        found = self.values(*tags)
        return found[0] if found else None

    def column(self, *tags: str) -> list[str]:
        """The raw values (quoted as in the file) of the first of these tags that is there, in a
        loop or alone; empty if none is.

        Raises:
            BadCrystal: the tag occurs twice.
        """
        if self._known.isdisjoint(tags):
            return []
        for tag in tags:
            if (place := self.places.get(tag)) is not None:
                self._check(tag)
                number, column = place
                loop = self._loops[number]
                if number not in self._values:
                    self._values[number] = loop.values
                return self._values[number][column :: loop.width()]
            if tag in self.pairs:
                self._check(tag)
                return [self.pairs[tag]]
        return []

    def _check(self, tag: str) -> None:
        if tag in self.repeated:
            raise BadCrystal(f"the CIF gives {tag} twice, with other values")

    @property
    def is_structure(self) -> bool:
        """Whether it lists atoms."""
        if _SITE in self.places or _SITE in self.pairs:
            return True
        return any(tag in self.places or tag in self.pairs for tag in _OTHER_SITES)


NULLS = (".", "?", "")
"""Raw values that stand for the default and the unknown, and one that is missing."""
QUOTES = ("'", '"', ";")
"""What quoted values start with."""

_tags: dict[str, str] = {}


def _tag(name: str) -> str:
    """A tag in its one spelling; those seen before from a table."""
    tag = _tags.get(name)
    if tag is None:
        if len(_tags) > _MOST_TAGS:
            _tags.clear()
        tag = name.lower().replace(".", "_").replace("-", "_").rstrip("_")
        _tags[name] = tag = sys.intern(tag)
    return tag


_MOST_TAGS = 20_000


def parse_blocks(text: str) -> list[Block]:
    """The data blocks of a CIF.

    Raises:
        BadCrystal: its syntax is broken; says where.
    """
    return [Block(block) for block in _document(text)]


def structure_blocks(text: str) -> list[Block]:
    """The data blocks that list atoms, at least one.

    Raises:
        BadCrystal: none does, or the syntax is broken.
    """
    blocks = parse_blocks(text)
    found = [block for block in blocks if block.is_structure]
    if not found:
        names = ", ".join(block.name for block in blocks[:5])
        what = f"its {len(blocks)} data blocks ({names}) list" if len(blocks) > 1 else "it lists"
        raise BadCrystal(f"the CIF holds no structure: {what} no atoms", "no structure")
    return found


def _document(text: str) -> cif.Document:
    try:
        return cif.read_string(text, 0)
    except (ValueError, RuntimeError) as error:
        reason = str(error)
    mended = text
    for mend in (_with_header, _without_lists, _with_quotes, _in_ascii):
        mended = mend(mended)
        try:
            return cif.read_string(mended, 0)
        except (ValueError, RuntimeError):
            continue
    where = re.sub(r"^string:(\d+):(\d+)\(\d+\)", r"line \1", reason)
    raise BadCrystal(f"the CIF is broken: {' '.join(where.split())[:200]}", "unreadable")


def _with_header(text: str) -> str:
    """With a block header, where the first tag has none above it."""
    first = re.search(r"^\s*(?:data_|global_|loop_|_)", text, re.M | re.I)
    bare = first is not None and first[0].strip().lower() in ("loop_", "_")
    return f"data_\n{text}" if bare else text


def _without_lists(text: str) -> str:
    """Without the lists, tables and triple quotes of CIF 2, in none of which structures are."""
    if not text.lstrip().lower().startswith("#\\#cif_2"):
        return text
    text = re.sub(r"(?<=\s)(\"\"\"|\'\'\').*?\1(?=\s)", "?", text, flags=re.S)
    for _ in range(9):  # the innermost first
        text = re.sub(r"(?<=[\s\[{:,])(?:\[[^\[\]{}]*\]|\{[^\[\]{}]*\})(?=[\s\]},])", "?", text)
    return text


def _with_quotes(text: str) -> str:
    """With quotes around values of several words: `_x F m -3 m`."""
    lines, inside = text.split("\n"), False
    for number, line in enumerate(lines):
        if line.startswith(";"):
            inside = not inside
        elif not inside and (match := _UNQUOTED.match(line)) and "'" not in match[2]:
            lines[number] = f"{match[1]} '{match[2].strip()}'"
    return "\n".join(lines)


_UNQUOTED = re.compile(
    r"^(\s*_\S+)\s+((?!['\"#;$_\[\]])[^\s#]+(?:[ \t]+(?![#_]|loop_|data_)[^\s#]+)+)\s*(?:#.*)?$",
    re.I,
)


def _in_ascii(text: str) -> str:
    return re.sub(r"[^\x00-\x7f]", "?", text)
