"""Which of the samples of a formula to believe first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.duplicates.matcher import Matcher, Reduced
from crysforge.trainer.generation.request import Asked

Judge = Callable[[Sequence[Crystal]], Sequence[float]]
"""Crystals → an energy per atom of each, NaN where there is none; lower is better."""


@dataclass(frozen=True)
class Ranked:
    """A sample in its place."""

    asked: Asked
    crystal: Crystal
    rank: int = 0
    """From 1 among the samples of the same formula."""
    score: float = math.nan
    """The judge's energy per atom, or the share of the samples that have this structure."""
    same_as: str = ""
    """The best-ranked sample that has the same structure, where that is another one."""


def ranked(
    samples: Sequence[tuple[Asked, Crystal]], judge: Judge | None = None, agree: bool = True
) -> list[Ranked]:
    """Samples in order of their formulas as asked, and of their ranks.

    Args:
        judge: gives energies; without one, samples that agree with more others come first.
        agree: whether to look for samples with the same structure.
    """
    scores = [math.nan] * len(samples)
    if judge is not None:
        scores = list(judge([crystal for _, crystal in samples]))
    groups: dict[tuple[str, str], list[Ranked]] = {}
    for (asked, crystal), score in zip(samples, scores, strict=True):
        entry = Ranked(asked, crystal, score=score)
        groups.setdefault((asked.formula, asked.target), []).append(entry)
    out: list[Ranked] = []
    for (formula, _), group in groups.items():
        if formula and agree:
            group = _with_agreement(group, judge is not None)
        order = 1 if judge is not None else -1
        group = sorted(group, key=lambda r: math.inf if math.isnan(r.score) else order * r.score)
        out += _first_of_each([replace(r, rank=i) for i, r in enumerate(group, start=1)])
    return out


def _with_agreement(group: list[Ranked], judged: bool) -> list[Ranked]:
    """With `same_as` set to the first sample of a structure; and the share of the samples that have
    it as the score, unless a judge gave one."""
    matcher = Matcher(stol=0.3)
    clusters: list[tuple[Reduced, list[int]]] = []
    for number, entry in enumerate(group):
        try:
            reduced = Reduced(entry.crystal, number)
        except Exception:  # pymatgen gives up on a cell in more ways than one
            continue
        for first, members in clusters:
            if matcher.may_fit(first, reduced) and _fits(matcher, first, reduced):
                members.append(number)
                break
        else:
            clusters.append((reduced, [number]))
    out = [r if judged else replace(r, score=0.0) for r in group]
    for _, members in clusters:
        share = len(members) / len(group)
        for number in members:
            score = group[number].score if judged else share
            name = group[members[0]].asked.wanted.name
            out[number] = replace(out[number], score=score, same_as=name)
    return out


def _fits(matcher: Matcher, first: Reduced, other: Reduced) -> bool:
    try:
        return matcher.fits(first, other)
    except Exception:  # as above
        return False


def _first_of_each(group: list[Ranked]) -> list[Ranked]:
    """`same_as` names the best-ranked of a structure, and is empty for that one itself."""
    best: dict[str, str] = {}
    out = []
    for entry in group:
        name = entry.asked.wanted.name
        first = best.setdefault(entry.same_as, name) if entry.same_as else name
        out.append(replace(entry, same_as="" if first == name else first))
    return out
