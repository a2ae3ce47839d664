"""What counts as a duplicate, and what is known of those that were found."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from crysforge.datapipe.common.checked import Count, Name
from crysforge.datapipe.preparing.duplicates.matcher import MAX_ATOMS
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import SPLITS

WITHIN = -1
"""Number of the data set itself; references have 0, 1, …"""


@dataclass(kw_only=True)
class Duplicates:
    """What counts as a duplicate: the same reduced formula and a match by pymatgen's
    StructureMatcher, with the tolerances of the DAO paper's Algorithm 2."""

    splits: list[str] = field(default_factory=lambda: ["test"])
    """Splits of the data sets in `dedup` that count. Of files, all crystals count."""
    ids: bool = True
    """Whether the same id and reduced formula make a duplicate too, match or not."""
    within: bool = False
    """Whether to look for duplicates among the crystals themselves, too."""
    keep: str = "first"
    """Which of several to keep: first, lowest:LABEL or highest:LABEL. In any case those of test
    come before those of val, and these before those of train."""
    stol: float = 0.1
    """Largest displacement of an atom, in units of (volume/atom)^(1/3)."""
    angle_tol: float = 10.0
    """Largest difference of a cell angle in degrees."""
    ltol: float = 0.3
    """Largest relative difference of a cell length, at equal volume."""
    max_atoms: int = MAX_ATOMS
    """Atoms of the largest crystal whose structure is compared: the time grows with more than
    their cube. Larger ones are listed as undecided."""

    def __post_init__(self) -> None:
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise ValueError(
                f"duplicates.splits must be some of {', '.join(SPLITS)}, got {list(self.splits)}"
            )
        rule, _, label = self.keep.partition(":")
        if (rule, bool(label)) not in (("first", False), ("lowest", True), ("highest", True)):
            raise ValueError(
                f"duplicates.keep must be first, lowest:LABEL or highest:LABEL, got {self.keep!r}"
            )
        if self.max_atoms < 1:
            raise ValueError(f"duplicates.max_atoms must be at least 1, got {self.max_atoms}")
        for name in ("stol", "angle_tol", "ltol"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"duplicates.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class Reference:
    """A data set whose crystals must not occur in another."""

    name: str
    dataset: Dataset
    splits: Sequence[str]
    origin: Mapping[str, Any]
    """What identifies it in a report."""

    @property
    def items(self) -> np.ndarray:
        """Item numbers of the crystals that count, ascending; with folds, each is tested once."""
        if self.dataset.folds:
            return np.arange(len(self.dataset))
        return np.concatenate([self.dataset.split_items(s) for s in SPLITS if s in self.splits])


@dataclass
class Found:
    """Which crystals are duplicates of which.

    Attributes:
        matches: one for each duplicate and set that has it: `item` and `id` of the duplicate, its
            `formula`, number of the `set` (-1: the data set itself), `other` and `other_id` there,
            `by` ("structure" or "id"), `rms` and `largest` displacement as in `matcher.Match`.
        undecided: `set`, `id` and `why`, where the matcher failed; these count as no duplicates.
        pairs: how many pairs have the same `formula`; the same atoms in the primitive cell too, so
            that a match was looked for until one was found (`sites`); were `compared` by the
            matcher, as other cells or atoms ruled out no match; `matched`.
    """

    matches: list[dict[str, Any]] = field(default_factory=list)
    undecided: list[dict[str, Any]] = field(default_factory=list)
    pairs: Counter[str] = field(default_factory=Counter)


OUTCOME = {
    "matches": [{
        "item": Count, "id": str, "formula": Name, "set": int, "other": Count, "other_id": str,
        "by": Literal["structure", "id"], "rms": float | None, "largest": float | None,
    }],
    "undecided": [{"set": int, "id": str, "why": str}],
    "pairs": dict[Literal["formula", "sites", "compared", "matched"], Count],
}  # fmt: skip
"""`Found` as it is kept, formula by formula."""


@dataclass(frozen=True)
class FormulaTask:
    """The crystals of one reduced formula, or a part of them."""

    key: str
    items: list[int]
    """Of the data set, those to be kept first in front."""
    references: list[list[int]]
    """Of each reference."""
    part: int = 0
    parts: int = 1
    """Of a large formula, the part decides the crystals whose primitive cells belong to it."""

    def is_here(self, counts: tuple) -> bool:
        """Whether this part decides crystals whose primitive cells hold these atoms."""
        return zlib.crc32(repr(counts).encode()) % self.parts == self.part

    def pairs(self, within: bool) -> int:
        """Pairs that the formula alone leaves."""
        n, known = len(self.items), sum(map(len, self.references))
        return n * known + (n * (n - 1) // 2 if within else 0)
