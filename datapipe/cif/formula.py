"""Chemical formulae as files write them, and whether a cell's atoms are a multiple of one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ase.data import atomic_numbers, chemical_symbols

NUMBERS: Mapping[str, int] = {
    **{s: z for s, z in atomic_numbers.items() if z > 0},
    "D": 1,
    "T": 1,
}
"""Atomic number by symbol; those of hydrogen's isotopes are 1."""

_CHARGE = re.compile(r"(?<=[\s\])}A-Za-z0-9])\d*\.?\d*[+-](?=[\s,;)\]}]|$)")
_LONGEST = 2000
"""Characters of a formula."""
_DOT = re.compile(r"\s\.\s*(?=[\d(\[A-Z])")
_TOKEN = re.compile(
    r"\s*(?:(?P<element>[A-Z][a-z]?)|(?P<open>[(\[{])|(?P<close>[)\]}])"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:\(\d+\))?)|(?P<next>[,*·•;]))"
)
_PLAIN = re.compile(r"([A-Za-z]{1,2})(\d*\.?\d*)")


@dataclass(frozen=True)
class Formula:
    """The content of a formula unit."""

    text: str
    counts: Mapping[int, float]
    """Atoms by atomic number."""
    error: Mapping[int, float]
    """Half a unit of the last digit given of each count; 0 for whole numbers."""

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers."""
        return frozenset(self.counts)

    def multiple(self, atoms: Mapping[int, int]) -> float | None:
        """How many formula units the atoms are; None if they are no multiple of it."""
        if atoms.keys() != self.counts.keys():
            return None
        most = max(self.counts, key=lambda z: self.counts[z])
        if not any(self.error.values()):
            units = atoms[most] / self.counts[most]
            same = all(
                abs(atoms[z] * self.counts[most] - atoms[most] * n) < 1e-6
                for z, n in self.counts.items()
            )
            return units if same else None
        units = sum(atoms.values()) / sum(self.counts.values())
        same = all(
            abs(atoms[z] / units - n) <= self.error[z] + 0.01 * n for z, n in self.counts.items()
        )
        return units if same else None


@lru_cache(maxsize=4096)
def parse_formula(text: str) -> Formula | None:
    """`Ca H2 O2`, `Mg (O H)2`, `C6 H12 N2 2+, 2(Cl 1-)`, `Cu S O4 * 5H2 O`, `NA1 CL1`; None if it
    cannot be read, as where it holds unknowns (`Na1-x`)."""
    if len(text) > _LONGEST:
        return None
    clean = _DOT.sub(",", _CHARGE.sub("", text.strip().strip("'\"")))
    counts = _read(clean)
    if counts is None and (words := clean.split()):  # capitals throughout, in words
        found = [_PLAIN.fullmatch(word) for word in words]
        clean = " ".join(m[1].capitalize() + m[2] for m in found if m)
        counts = _read(clean) if all(found) else None
    if not counts:
        return None
    merged: Counter[int] = Counter()
    error: Counter[int] = Counter()
    for symbol, (count, doubt) in counts.items():
        merged[NUMBERS[symbol]] += count  # type: ignore[assignment]
        error[NUMBERS[symbol]] += doubt  # type: ignore[assignment]
    return Formula(text.strip(), dict(merged), {z: error[z] for z in merged})


Counts = dict[str, tuple[float, float]]
"""Count and its doubt by symbol."""


def _read(text: str) -> Counts | None:
    """The counts of a formula by its tokens."""
    stack: list[list[Counts]] = [[{}]]  # of open brackets, each with the parts that commas part
    factors: list[list[float]] = [[1.0]]
    last: Counts | None = None  # what a number would multiply
    place = 0
    while place < len(text.rstrip()):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        place = match.end()
        kind, word = match.lastgroup, match[match.lastgroup or 0]
        if kind == "element":
            if word not in NUMBERS:
                return None
            last = {word: (1.0, 0.0)}
            _add(stack[-1][-1], last)
        elif kind == "open":
            stack.append([{}])
            factors.append([1.0])
            last = None
        elif kind == "close":
            if len(stack) == 1:
                return None
            last = _total(stack.pop(), factors.pop())
            _add(stack[-1][-1], last)
        elif kind == "number":
            digits = word.partition("(")[0]
            value = float(digits)
            doubt = 0.5 * 10.0 ** -len(digits.partition(".")[2]) if "." in digits else 0.0
            if last is None:
                factors[-1][-1] *= value
            else:
                _add(stack[-1][-1], last, value, doubt)
            last = None
        else:
            stack[-1].append({})
            factors[-1].append(1.0)
            last = None
    if len(stack) > 1:
        return None
    return {s: n for s, n in _total(stack[0], factors[0]).items() if n[0] > 0}


def _add(into: Counts, part: Counts, factor: float | None = None, doubt: float = 0.0) -> None:
    """Adds a part; with a factor, in place of the one time that it is in already."""
    times = 1.0 if factor is None else factor - 1
    for symbol, (count, error) in part.items():
        old = into.get(symbol, (0.0, 0.0))
        into[symbol] = (old[0] + count * times, old[1] + error + count * doubt)


def _total(parts: list[Counts], factors: list[float]) -> Counts:
    total: Counts = {}
    for part, factor in zip(parts, factors, strict=True):
        for symbol, (count, error) in part.items():
            old = total.get(symbol, (0.0, 0.0))
            total[symbol] = (old[0] + count * factor, old[1] + error * factor)
    return total


def in_words(atoms: Mapping[int, float]) -> str:
    """`Ca S2 O2`, in the order given."""
    return " ".join(chemical_symbols[z] + ("" if n == 1 else f"{n:g}") for z, n in atoms.items())
