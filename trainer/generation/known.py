"""Crystals of a data set that others are looked for in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.duplicates.matcher import Group, Matcher, Reduced
from crysforge.datapipe.storage.dataset import SPLITS, Dataset

Composition = tuple[tuple[int, int], ...]


def composition_of(crystal: Crystal) -> Composition:
    """(atomic number, atoms) of the reduced formula, ascending."""
    elements, counts = np.unique(crystal.numbers, return_counts=True)
    counts = counts // np.gcd.reduce(counts)
    return tuple(zip(elements.tolist(), counts.tolist(), strict=True))


@dataclass
class Known:
    """Those of some compositions, by what their primitive cells hold."""

    crystals: dict[Composition, list[Crystal]] = field(default_factory=dict)
    _groups: dict[Composition, dict[tuple, Group]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, data: Dataset, wanted: Collection[Composition] | None, splits: Collection[str] = SPLITS
    ) -> Known:
        """Those of a data set that have a wanted composition; None: all."""
        found: dict[Composition, list[Crystal]] = defaultdict(list)
        for split in splits:
            for _, crystal in data.read(data.split_items(split).tolist()):
                if isinstance(crystal, Crystal):
                    key = composition_of(crystal)
                    if wanted is None or key in wanted:
                        found[key].append(crystal)
        return cls(dict(found))

    def same(self, crystal: Crystal, matcher: Matcher) -> str:
        """Id of one that the matcher takes for the same; empty if there is none, or nobody can
        tell."""
        key = composition_of(crystal)
        if key not in self.crystals:
            return ""
        try:
            reduced = Reduced(crystal, -1)
        except Exception:  # pymatgen gives up on a cell in more ways than one
            return ""
        group = self._reduced(key).get(reduced.counts)
        for other in group.nearest(reduced) if group else ():
            try:
                if matcher.may_fit(other, reduced) and matcher.fits(other, reduced):
                    return other.id
            except Exception:  # as above
                continue
        return ""

    def _reduced(self, key: Composition) -> dict[tuple, Group]:
        if key not in self._groups:
            groups: dict[tuple, Group] = defaultdict(Group)
            for number, crystal in enumerate(self.crystals[key]):
                try:
                    reduced = Reduced(crystal, number)
                except Exception:  # as above
                    continue
                groups[reduced.counts].add(reduced)
            self._groups[key] = groups
        return self._groups[key]
