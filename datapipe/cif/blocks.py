"""CIF text to data blocks, whose tags are found however they are spelt."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from gemmi import cif

from crysforge.datapipe.crystals.crystal import BadCrystal

_SITE = "_atom_site_fract_x"
_OTHER_SITES = ("_atom_site_cartn_x", "_atom_site_label_atom_id")


@dataclass
class Block:
    """One data block. Tags are asked for in lower case with `_` for every `.` and `-`, so that
    `_space_group.name_H-M_alt` is `_space_group_name_h_m_alt`, as are its other spellings."""

    name: str
    pairs: dict[str, str] = field(default_factory=dict)
    """Raw values outside loops."""
    loops: dict[str, tuple[cif.Loop, int]] = field(default_factory=dict)
    """Loop and column of a tag."""
    repeated: set[str] = field(default_factory=set)
    """Tags with two values that differ."""

    @classmethod
    def of(cls, source: cif.Block) -> Block:
        """Lists the tags of a parsed block."""
        block = cls(source.name.strip())
        for item in source:
            if (pair := item.pair) is not None:
                tag = _tag(pair[0])
                if block.pairs.setdefault(tag, pair[1]) != pair[1] or tag in block.loops:
                    block.repeated.add(tag)
            elif (loop := item.loop) is not None:
                for column, name in enumerate(loop.tags):
                    tag = _tag(name)
                    if tag in block.loops or tag in block.pairs:
                        block.repeated.add(tag)
                    block.loops[tag] = loop, column
        return block

    def values(self, *tags: str) -> list[str]:
        """The values that the file gives for any of the tags, without `.` and `?`.

        Raises:
            BadCrystal: one of them has several.
        """
        found = []
        for tag in tags:
            if tag in self.repeated:
                raise BadCrystal(f"the CIF gives {tag} twice, with other values")
            raw = self.pairs.get(tag)
            if raw is None and tag in self.loops and self.loops[tag][0].length() == 1:
                raw = self.column(tag)[0]
            if raw is not None and not cif.is_null(raw) and (text := cif.as_string(raw).strip()):
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
        for tag in tags:
            if tag in self.repeated:
                raise BadCrystal(f"the CIF gives {tag} twice, with other values")
            if tag in self.loops:
                loop, column = self.loops[tag]
                return loop.values[column :: loop.width()]
            if tag in self.pairs:
                return [self.pairs[tag]]
        return []

    def has(self, *starts: str) -> str | None:
        """A tag that starts with one of these and has a value."""
        for tag in (*self.pairs, *self.loops):
            if tag.startswith(starts) and not all(cif.is_null(v) for v in self.column(tag)):
                return tag
        return None

    @property
    def is_structure(self) -> bool:
        """Whether it lists atoms."""
        return _SITE in self.loops or _SITE in self.pairs or self.has(*_OTHER_SITES) is not None


def _tag(name: str) -> str:
    return name.lower().replace(".", "_").replace("-", "_").rstrip("_")


def parse_blocks(text: str) -> list[Block]:
    """The data blocks of a CIF.

    Raises:
        BadCrystal: its syntax is broken; says where.
    """
    return [Block.of(block) for block in _document(text)]


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
    for mended in (
        f"data_unnamed\n{text}" if "expected block header" in reason else None,
        re.sub(r"[^\x00-\x7f]", "?", text) if not text.isascii() else None,
    ):
        try:
            if mended is not None:
                return cif.read_string(mended, 0)
        except (ValueError, RuntimeError):
            continue
    where = re.sub(r"^string:(\d+):(\d+)\(\d+\)", r"line \1", reason)
    raise BadCrystal(f"the CIF is broken: {' '.join(where.split())[:200]}", "unreadable")
