"""Elements from type symbols and labels, by the rules of the CIF dictionary."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from crysforge.datapipe.cif.formula import NUMBERS

_LONGEST_LIVED = 99
"""Elements beyond are read only where the formula has them: `NH4` is no nihonium."""

_START = re.compile(r"^[\d^()\[\]{}]*([A-Za-z]+)(.*)$", re.S)
_CHARGE = re.compile(r"[^A-Za-z]*|[({].*[)}]|[\d+-]*_.*", re.S)
_SECOND = re.compile(r"[/,;|&\s]\W*([A-Z][a-z]?)|([A-Z][a-z])(?![a-z])")
_WATER = re.compile(r"H[23]O\W*\d*", re.I)


@dataclass(frozen=True, eq=False)
class Species:
    """What a site may be.

    Attributes:
        numbers: atomic numbers, the likeliest first; none where no element fits.
        sure: whether the first may be taken without the formula's word for it. Where it is not, a
            formula or density has to agree with the whole cell.
        words: type symbol or label, for messages.
        key: equal for sites that are the same element, whatever it is.
    """

    numbers: tuple[int, ...]
    sure: bool
    words: str
    key: str


@lru_cache(maxsize=65536)
def species_of(label: str, type_symbol: str, allowed: frozenset[int] | None) -> Species:
    """The element of a site from its type symbol, else from its label.

    Args:
        type_symbol: empty where the file has none.
        allowed: atomic numbers that the file's formula (or list of types) has; None if it has none.
    """
    if type_symbol:
        words = f"type symbol {type_symbol!r}"
        number = _whole(type_symbol, allowed)
        if number is not None:
            return Species((number,), True, words, words)
        numbers, _ = _readings(type_symbol, allowed)
        kept = tuple(z for z in numbers if allowed is None or z in allowed)
        return Species(kept, False, words, words)
    numbers, sure = _readings(label, allowed)
    sure = sure and not _names_another(label)
    if allowed is not None:
        kept = tuple(z for z in numbers if z in allowed)
        sure = sure and kept[:1] == numbers[:1]
        sure = sure or (len(numbers) == 2 and len(kept) == 1 and len(_letters(label)) == 2)
        numbers = kept
    return Species(numbers, sure, f"label {label!r}", f"label {_letters(label)}…")


def _whole(symbol: str, allowed: frozenset[int] | None) -> int | None:
    """The element of a type symbol that is one, with charge or isotope: `O2-`, `Fe+3`, `2H`; not
    of one that may be a molecule, as `CO3` and `NO2-`, nor of `T` (tritium, or a tetrahedral
    site)."""
    match = _START.match(symbol)
    if match is None or not _CHARGE.fullmatch(match[2]) or len(match[1]) > 2 or match[1] == "T":
        return None
    letters = match[1]
    molecule = len(letters) == 2 and letters[1].upper() == letters[1] and letters[1] in NUMBERS
    if molecule and not re.fullmatch(r"\d?\+\d?", match[2]):
        return None
    return _element(letters.capitalize(), allowed)


def _readings(label: str, allowed: frozenset[int] | None) -> tuple[tuple[int, ...], bool]:
    """Elements that a label may start with, and whether the first is sure."""
    letters = _letters(label)
    if not letters:
        return (), False
    one = _element(letters[0].upper(), allowed)
    two = _element(letters[:2].capitalize(), allowed) if len(letters) > 1 else None
    found = tuple(z for z in (two, one) if z is not None)
    if _WATER.fullmatch(label):
        return (1, 8), False
    if len(letters) == 1:
        return found, letters.upper() != "T"
    proper = letters[0].isupper() and letters[1].islower()
    if two is not None and (proper or one is None):
        return found, len(letters) == 2 or letters[2].isupper()
    return found, False


def _names_another(label: str) -> bool:
    """Whether a label names a second element, as that of a mixed site does: `Mg/Fe`, `(Ca,Sr)`,
    `AlSi1`. One capital alone is the letter of a site."""
    match = _START.match(label)
    found = _SECOND.findall(label, match.start(1) + 1) if match else []
    return any(NUMBERS.get(a or b, _LONGEST_LIVED + 1) <= _LONGEST_LIVED for a, b in found)


def _letters(label: str) -> str:
    match = _START.match(label)
    return match[1] if match else ""


def _element(symbol: str, allowed: frozenset[int] | None) -> int | None:
    number = NUMBERS.get(symbol)
    if number is not None and number > _LONGEST_LIVED and number not in (allowed or ()):
        return None
    return number
