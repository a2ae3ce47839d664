"""Which of several readings of a CIF is the one that it means."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from ase.data import chemical_symbols

from crysforge.datapipe.cif.formula import in_words
from crysforge.datapipe.cif.geometry import impossible_pair, same_crystal, shortest_distances
from crysforge.datapipe.cif.symmetry import Candidate
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal


@dataclass
class Attempt:
    """The crystal by one reading of the symmetry and of the labels."""

    candidate: Candidate
    elements: str
    """How doubtful labels are read."""
    crystal: Crystal
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.candidate.name, self.elements]))


def choose(attempts: list[Attempt], checks: str) -> Crystal:
    """The one crystal that the file means.

    Raises:
        BadCrystal: none that agrees with the file, or several.
    """
    sound = [a for a in attempts if not a.problems]
    if not sound and len(attempts) > 1:
        each = "; ".join(f"as {a}: {a.problems[0]}" for a in attempts[:4])
        raise BadCrystal(f"no reading of the CIF agrees with it: {each}", "contradiction")
    if len(sound) > 1:
        distinct = _distinct(sound)
        sound = _by_distances(distinct) if len(distinct) > 1 else distinct
        if len(sound) > 1:
            each = "; ".join(
                f"{a} gives {in_words(Counter(a.crystal.numbers.tolist()))}" for a in sound[:4]
            )
            raise BadCrystal(
                f"the CIF is ambiguous: {each}; give symmetry operations and type symbols",
                "ambiguous",
            )
    chosen = (sound or attempts)[0]
    problems = chosen.problems + _too_close(chosen)
    if problems and checks == "strict":
        raise BadCrystal(f"the CIF contradicts itself: {'; '.join(problems)}", "contradiction")
    return replace(chosen.crystal, notes=tuple(problems)) if problems else chosen.crystal


def _too_close(attempt: Attempt) -> list[str]:
    """Atoms that symmetry brings closer than any come: alternatives of a split site, or the
    operations of another setting."""
    pair = impossible_pair(attempt.crystal) if len(attempt.candidate.group) > 1 else None
    if pair is None:
        return []
    i, j, distance = pair
    a, b = (chemical_symbols[attempt.crystal.numbers[k]] for k in (i, j))
    return [f"atoms {i} ({a}) and {j} ({b}) are {distance:.2f} Å apart, closer than any such come"]


def _by_distances(attempts: list[Attempt]) -> list[Attempt]:
    """Without the attempts whose atoms overlap; of those that are left, the one whose atoms are at
    usual distances, if they are impossible in all others."""
    found = [(attempt, shortest_distances(attempt.crystal)) for attempt in attempts]
    found = [(a, kind) for a, kind in found if kind != "overlap"] or found
    usual = [a for a, kind in found if kind == "usual"]
    if len(usual) == 1 and all(kind in ("usual", "impossible") for _, kind in found):
        return usual
    return [a for a, _ in found]


def _distinct(attempts: list[Attempt]) -> list[Attempt]:
    found: list[Attempt] = []
    for attempt in attempts:
        if not any(same_crystal(attempt.crystal, other.crystal) for other in found):
            found.append(attempt)
    return found
