"""POSCAR and CONTCAR files, as VASP itself reads them."""

from __future__ import annotations

import math
import re

import numpy as np

from crysforge.datapipe.cif.formula import NUMBERS
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal

_COMMENT = re.compile(r"[!#].*")
_DECIMAL = re.compile(r"[+-]?\d+,\d+(?:[eEdD][+-]?\d+)?")
_SYMBOL = re.compile(r"([A-Za-z]{1,2})(?:_[A-Za-z0-9_.]+)?(?:/[0-9a-fA-F]*)?")
_TITLE = re.compile(r"([A-Z][a-z]?)(\d*)")
_LEAST = 8
"""Lines of the shortest POSCAR."""


def read_poscar(text: str) -> Crystal:
    """The crystal of a POSCAR: VASP 5 or VASP 4 with the elements in its title; one scale factor,
    a negative one (the volume in Å³), or three; Fortran numbers; comments after values; selective
    dynamics; direct or Cartesian positions.

    Raises:
        BadCrystal: no elements, or a line that is not what VASP would want there; says which.
    """
    lines = text.split("\n")
    if len(lines) < _LEAST:
        raise BadCrystal("the text is neither a CIF nor a POSCAR", "unreadable")
    scale = _scale(lines[1])
    vectors = np.array([_numbers(lines[i], i, 3) for i in (2, 3, 4)])
    symbols, counts, at = _species(lines)
    cell, factor = _scaled(vectors, scale)
    at += _COMMENT.sub("", lines[at]).strip()[:1].lower() == "s"
    if at >= len(lines):
        raise BadCrystal("the POSCAR ends before its positions", "unreadable")
    cartesian = lines[at].strip()[:1].lower() in ("c", "k")
    if not cartesian and lines[at].strip()[:1].lower() != "d":
        raise BadCrystal(
            f"line {at + 1} of the POSCAR should say Direct or Cartesian, found "
            f"{lines[at].strip()[:40]!r}",
            "unreadable",
        )
    total = sum(counts)
    rows = lines[at + 1 : at + 1 + total]
    if len(rows) < total:
        raise BadCrystal(f"the POSCAR lists {len(rows)} of its {total} positions", "unreadable")
    frac = np.array([_numbers(row, at + 1 + i, 3) for i, row in enumerate(rows)])
    if at + 1 + total < len(lines) and _is_position(lines[at + 1 + total]):
        raise BadCrystal(
            f"the counts of the POSCAR add up to {total}, but there are more positions",
            "unreadable",
        )
    if cartesian:
        frac = np.linalg.solve(cell.T, (frac * factor).T).T
    listed = _listed(lines[0], symbols, counts, rows)
    return Crystal.create("", [NUMBERS[s] for s in listed], frac, cell)


def _scale(line: str) -> np.ndarray:
    """[1] or [3] factors."""
    words = _words(line)
    values = []
    for word in words[:3]:
        try:
            values.append(_float(word))
        except ValueError:
            break
    scale = np.array(values[:3] if len(values) == 3 else values[:1])
    if not len(scale) or not scale.all() or (len(scale) == 3 and (scale < 0).any()):
        raise BadCrystal(
            f"line 2 of the POSCAR must be one scale factor, or three positive ones, found "
            f"{line.strip()[:40]!r}",
            "unreadable",
        )
    return scale


def _scaled(vectors: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cell vectors in Å, and what Cartesian positions are multiplied by."""
    if len(scale) == 1 and scale[0] < 0:
        volume = abs(np.linalg.det(vectors))
        if volume < 1e-9:
            raise BadCrystal("the cell is flat")
        scale = (-scale / volume) ** (1 / 3)
    return vectors * scale, scale


def _species(lines: list[str]) -> tuple[list[str] | None, list[int], int]:
    """Symbol (none in VASP 4) and count of each species, and the number of the line after."""
    words = _words(lines[5])
    if words and not words[0].isdigit():
        symbols = [_symbol(word) for word in words]
        return symbols, _counts(lines[6], 6, symbols), 7
    return None, _counts(lines[5], 5, None), 6


def _listed(title: str, symbols: list[str] | None, counts: list[int], rows: list[str]) -> list[str]:
    """The symbol of every atom: by the line above the counts, else (VASP 4) by the title, else by
    what stands beside the positions.

    Raises:
        BadCrystal: none of them says it, or two differ.
    """
    beside = [_beside(row) for row in rows]
    symbols = symbols or _in_title(title, counts)
    if symbols is None:
        starts = [sum(counts[:i]) for i in range(len(counts))]
        parts = [set(beside[i : i + n]) for i, n in zip(starts, counts, strict=True)]
        if not all(len(part) == 1 and None not in part for part in parts):
            raise BadCrystal(
                f"the POSCAR (VASP 4) does not name its {len(counts)} elements: put their symbols "
                f"into the line before the counts; its title is {title.strip()[:40]!r}",
                "unknown element",
            )
        symbols = [str(*part) for part in parts]
    listed = [s for s, n in zip(symbols, counts, strict=True) for _ in range(n)]
    for symbol, other in zip(listed, beside, strict=True):
        if other is not None and NUMBERS[other] != NUMBERS[symbol]:
            raise BadCrystal(
                f"the POSCAR calls an atom {symbol} by its counts, {other} beside its position"
            )
    return listed


def _in_title(title: str, counts: list[int]) -> list[str] | None:
    """The symbols in a title such as `Na Cl` or `Na4 Cl4`, if it has one for each count."""
    words = _words(title)
    found = [_TITLE.fullmatch(word) for word in words]
    if len(words) != len(counts):
        return None
    named = [m[1] for m in found if m and m[1] in NUMBERS]
    numbers = [m[2] for m in found if m]
    fits = all(n in ("", str(count)) for n, count in zip(numbers, counts, strict=False))
    return named if fits and len(named) == len(counts) else None


def _beside(row: str) -> str | None:
    """The symbol after a position, if there is one: the flags T and F are none."""
    words = [w for w in _words(row)[3:] if w not in ("T", "F", ".TRUE.", ".FALSE.")]
    return words[0] if words and words[0] in NUMBERS else None


def _counts(line: str, at: int, symbols: list[str] | None) -> list[int]:
    words = _words(line)
    if not words or not all(w.isdigit() for w in words):
        raise BadCrystal(
            f"line {at + 1} of the POSCAR must be the numbers of atoms, found "
            f"{line.strip()[:40]!r}",
            "unreadable",
        )
    counts = [int(w) for w in words]
    if symbols is not None and len(symbols) != len(counts):
        raise BadCrystal(
            f"the POSCAR names {len(symbols)} elements and {len(counts)} numbers of atoms",
            "unreadable",
        )
    return counts


def _symbol(word: str) -> str:
    """The element of `Na`, `Na_pv`, `Ti_sv_GW` or `Na/8a1b2c`."""
    match = _SYMBOL.fullmatch(word)
    symbol = match[1].capitalize() if match else ""
    if symbol not in NUMBERS:
        raise BadCrystal(f"unknown element {word!r}", "unknown element")
    return symbol


def _words(line: str) -> list[str]:
    """What commas and spaces separate; a decimal comma stays, and makes no number."""
    words = _COMMENT.sub("", line).split()
    return " ".join(w if _DECIMAL.fullmatch(w) else w.replace(",", " ") for w in words).split()


def _is_position(line: str) -> bool:
    try:
        return len([_float(w) for w in _words(line)[:3]]) == 3
    except ValueError:
        return False


def _numbers(line: str, at: int, count: int) -> list[float]:
    words = _words(line)[:count]
    try:
        values = [_float(word) for word in words]
    except ValueError:
        values = []
    if len(values) < count:
        raise BadCrystal(
            f"line {at + 1} of the POSCAR must start with {count} numbers, found "
            f"{line.strip()[:40]!r}",
            "unreadable",
        )
    return values


def _float(word: str) -> float:
    """A number as Fortran reads it: `1.0D0`, `1.d+0`, `.5`."""
    if "_" in word or word.lower().lstrip("+-")[:1] in ("n", "i"):  # of float()'s own
        raise ValueError(word)
    value = float(word.lower().replace("d", "e"))
    if not math.isfinite(value):
        raise ValueError(word)
    return value
