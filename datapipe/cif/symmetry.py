"""The space group of a CIF, from whatever it has: operations, Hall symbol, Hermann-Mauguin symbol,
number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from crysforge.datapipe.cif.blocks import Block
from crysforge.datapipe.cif.groups.operations import SymmetryGroup, group_of_hall, product_of
from crysforge.datapipe.cif.groups.symbols import (
    Setting,
    choose,
    number_in_symbol,
    number_of_schoenflies,
    settings_of_number,
    settings_of_symbol,
)
from crysforge.datapipe.crystals.crystal import BadCrystal

_MAGNETIC = ("_space_group_symop_magn_operation_xyz",)
_MAGNETIC_CENTRING = (
    "_space_group_symop_magn_centering_xyz",
    "_space_group_symop_magn_centring_xyz",
)
_MAGNETIC_NAME = ("_space_group_magn_name_bns", "_space_group_magn_number_bns")
_OPERATIONS = (
    "_space_group_symop_operation_xyz",
    "_symmetry_equiv_pos_as_xyz",
    "_symmetry_equiv_as_xyz",
    "_symmetry_pos_as_xyz",
)
_HALL = (
    "_space_group_name_hall",
    "_symmetry_space_group_name_hall",
    "_symmetry_space_group_hall",
)
_SYMBOL = (
    "_space_group_name_h_m_alt",
    "_symmetry_space_group_name_h_m",
    "_space_group_name_h_m",
    "_space_group_name_h_m_full",
    "_space_group_name_h_m_alternative",
    "_symmetry_space_group_name_h_m_alt",
    "_symmetry_space_group_name",
)
_REFERENCE = ("_space_group_name_h_m_ref",)
_NUMBER = (
    "_space_group_it_number",
    "_symmetry_int_tables_number",
    "_symmetry_space_group_it_number",
    "_space_group_number",
)
_SCHOENFLIES = ("_space_group_name_schoenflies", "_symmetry_space_group_name_schoenflies")
_DIGITS = re.compile(r"^\D{0,5}(\d{1,3})(?:\s*:?\s*([12HRhr]))?$")
_BARE_NUMBER = re.compile(r"\s*(?:no\.?|#)?\s*\d{1,3}\s*", re.I)
_CODE = ("_space_group_it_coordinate_system_code", "_symmetry_it_coordinate_system_code")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One reading of the symmetry."""

    group: SymmetryGroup
    setting: Setting | None = None

    @property
    def name(self) -> str:
        """Symbol, for messages."""
        return self.setting.name if self.setting else self.group.name


@dataclass(frozen=True, eq=False)
class Symmetry:
    """What a file says of its space group.

    Attributes:
        candidates: the groups that it may mean; several where a symbol or number leaves the origin
            or the axes open.
        problems: contradictions between what it says in several places.
        number: the space-group number that all names give; None if there are none.
        named: the settings that the symbol may mean.
        words: symbol or number, for messages.
        from_operations: whether the group was given by its operations.
        magnetic: whether they are those of a magnetic group.
    """

    candidates: tuple[Candidate, ...]
    problems: tuple[str, ...]
    number: int | None
    named: tuple[Setting, ...]
    words: str
    from_operations: bool
    magnetic: bool = False


def symmetry_of(block: Block) -> Symmetry:
    """What a data block says of its space group.

    Raises:
        BadCrystal: it says nothing, or what it says cannot be read.
    """
    centring: tuple[str, ...] = ()
    operations = _triplets(block, _MAGNETIC)
    magnetic = bool(operations)
    if magnetic:
        centring = _triplets(block, _MAGNETIC_CENTRING)
    else:
        operations = _triplets(block, _OPERATIONS)
    symbols, numbers, schoenflies = _sorted(block.values(*_SYMBOL))
    return _resolve(
        operations,
        centring,
        magnetic,
        tuple(block.values(*_HALL)),
        symbols,
        tuple(block.values(*_REFERENCE)),
        (*block.values(*_NUMBER), *numbers),
        (*block.values(*_SCHOENFLIES), *schoenflies),
        block.value(*_CODE) or "",
        block.value(*_MAGNETIC_NAME) or "",
    )


def _sorted(symbols: list[str]) -> tuple[tuple[str, ...], ...]:
    """Hermann-Mauguin symbols, and numbers and Schoenflies symbols that stand in their place."""
    numbers = [s for s in symbols if _BARE_NUMBER.fullmatch(s)]
    others = [s for s in symbols if s not in numbers]
    schoenflies = [
        s for s in others if not settings_of_symbol(s) and number_of_schoenflies(s) is not None
    ]
    return tuple(s for s in others if s not in schoenflies), tuple(numbers), tuple(schoenflies)


def _triplets(block: Block, tags: tuple[str, ...]) -> tuple[str, ...]:
    """Raw operations; those in one text field line by line."""
    column = block.column(*tags)
    if len(column) == 1 and column[0].startswith(";"):
        column = [line for line in column[0].strip("; \n").split("\n") if line.strip()]
    return tuple(column)


@lru_cache(maxsize=1024)
def _resolve(
    operations: tuple[str, ...],
    centring: tuple[str, ...],
    magnetic: bool,
    halls: tuple[str, ...],
    symbols: tuple[str, ...],
    references: tuple[str, ...],
    numbers: tuple[str, ...],
    schoenflies: tuple[str, ...],
    code: str,
    magnetic_name: str,
) -> Symmetry:
    for text in numbers:  # 166:R
        code = code or ((match := _DIGITS.match(text)) and match[2]) or ""
    named, unknown = _settings(symbols, code)
    hall = next((g for h in halls if (g := group_of_hall(h)) is not None), None)
    number, problems = _number(symbols, references, numbers, schoenflies, hall)
    words = " ".join([*dict.fromkeys(symbols), *(f"(number {n})" for n in dict.fromkeys(numbers))])
    words = words or " ".join((*halls, *schoenflies, *references))
    operations = tuple(o for o in operations if o.strip("'\" ") not in ("?", ".", ""))
    candidates: tuple[Candidate, ...] = ()
    if operations:
        candidates = (Candidate(product_of(operations, centring)),)
    elif hall is not None:
        if named and all(s.group.key != hall.key for s in named) and not problems:
            problems = [f"the Hall symbol is that of {hall.name}, the file also says {words}"]
        candidates = (Candidate(hall),)
    elif not unknown or named:
        settings = named or settings_of_number(number or 0)
        alike = tuple(s for s in settings if s.number == number)
        candidates = tuple(Candidate(s.group, s) for s in choose(alike or settings, code))
    if candidates:
        from_operations = bool(operations)
        return Symmetry(
            candidates, tuple(problems), number, named, words, from_operations, magnetic
        )
    if words or magnetic_name:
        raise BadCrystal(
            f"the space group {(words or magnetic_name)[:80]!r} is unknown: give its symmetry "
            "operations",
            "symmetry",
        )
    raise BadCrystal(
        "the CIF names no symmetry: give its operations or space group ('P 1' if all atoms are "
        "listed)",
        "symmetry",
    )


def _settings(symbols: tuple[str, ...], code: str) -> tuple[tuple[Setting, ...], list[str]]:
    """The settings that all symbols that are known allow, and the symbols that are not."""
    named: tuple[Setting, ...] = ()
    unknown = []
    for symbol in symbols:
        found = settings_of_symbol(symbol)
        if not found:
            unknown.append(symbol)
        both = tuple(s for s in named if s in found)
        named = both or named or found
    return choose(named, code), unknown


def _number(
    symbols: tuple[str, ...],
    references: tuple[str, ...],
    numbers: tuple[str, ...],
    schoenflies: tuple[str, ...],
    hall: SymmetryGroup | None,
) -> tuple[int | None, list[str]]:
    """The space-group number that all names agree on, and contradictions among them."""
    said: dict[int, str] = {}
    for text in numbers:
        match = _DIGITS.match(text)
        if match is None or int(match[1]) > 230:
            raise BadCrystal(f"space-group number {text!r}: there are 1 to 230", "symmetry")
        if int(match[1]):
            said.setdefault(int(match[1]), f"number {text}")
    for symbol in (*symbols, *references):
        found = {s.number for s in settings_of_symbol(symbol)}
        if found and not found & set(said):
            said.setdefault(min(found), repr(symbol))
        if (number := number_in_symbol(symbol)) is not None:
            said.setdefault(number, repr(symbol))
    for symbol in schoenflies:
        if (number := number_of_schoenflies(symbol)) is not None:
            said.setdefault(number, repr(symbol))
    if hall is not None and hall.number:
        said.setdefault(hall.number, f"that of its Hall symbol ({hall.number})")
    if len(said) > 1:
        return next(iter(said)), [f"the space group is {' but also '.join(said.values())}"]
    return (next(iter(said)) if said else None), []
