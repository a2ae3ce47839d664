"""Finds the crystals of a data set that other data sets have too, or that occur in it twice.

The crystals of one reduced formula are one task, and workers do many at once. Outcomes go to a
journal beside the output, so that a killed run continues where it was; they depend on the crystals
and the settings alone, not on the number of workers.
"""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols
from tqdm import tqdm

from crysforge.datapipe.common.checked import Count, Name
from crysforge.datapipe.common.journal import Journal
from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.matcher import MAX_ATOMS, Group, Match, Matcher, Reduced
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import SPLITS

WITHIN = -1
"""Number of the data set itself; references have 0, 1, …"""

_SCANNED = 500
"""Records whose formulas are read at a time."""

_LARGE = 1000
"""Crystals of one formula beyond which it becomes several tasks."""


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
        """Item numbers of the crystals that count, ascending."""
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
class Task:
    """The crystals of one reduced formula, or a part of them."""

    key: str
    items: list[int]
    """Of the data set, those to be kept first in front."""
    references: list[list[int]]
    """Of each reference."""
    part: int = 0
    parts: int = 1
    """Of a large formula, the part decides the crystals whose primitive cells belong to it."""

    def pairs(self, within: bool) -> int:
        """Pairs that the formula alone leaves."""
        n, known = len(self.items), sum(map(len, self.references))
        return n * known + (n * (n - 1) // 2 if within else 0)


@dataclass(frozen=True)
class _Entry:
    """A crystal of a task."""

    item: int
    crystal: Crystal
    reduced: Reduced | None
    """None: it cannot be reduced, or belongs to another part."""
    decided_here: bool


class _Known:
    """Crystals that others are compared with, by what their primitive cells hold."""

    def __init__(self) -> None:
        self.by_id: dict[str, _Entry] = {}
        self.groups: dict[tuple, Group] = defaultdict(Group)

    def add(self, entry: _Entry, by_id: bool) -> None:
        if by_id:
            self.by_id[entry.crystal.id] = entry
        if entry.reduced:
            self.groups[entry.reduced.counts].add(entry.reduced)


class Decide:
    """Finds the duplicates in a task; this is what worker processes do."""

    def __init__(
        self, dataset: Dataset, references: Sequence[Reference], settings: Duplicates
    ) -> None:
        self.sets = {n: r.dataset for n, r in enumerate(references)} | {WITHIN: dataset}
        self.settings = settings
        self.matcher = Matcher(settings.stol, settings.angle_tol, settings.ltol)

    def __call__(self, task: Task) -> tuple[str, Found]:
        found = Found()
        references = [_Known() for _ in task.references]
        for number, items in enumerate(task.references):
            for entry in self._read(number, items, task, found):
                references[number].add(entry, self.settings.ids)
        kept = _Known()
        for entry in self._read(WITHIN, task.items, task, found):
            if not entry.decided_here:
                continue
            hits = [self._find(n, known, entry, found) for n, known in enumerate(references)]
            if self.settings.within and not any(hits):
                hits = [self._find(WITHIN, kept, entry, found)]
                if not any(hits):
                    kept.add(entry, by_id=False)
            found.matches += [hit for hit in hits if hit]
        return task.key, found

    def _read(self, number: int, items: list[int], task: Task, found: Found) -> Iterator[_Entry]:
        for item, crystal in self.sets[number].read(items):
            if not isinstance(crystal, Crystal):
                raise OSError(f"{self.sets[number].root} changed while it was read: {crystal}")
            reduced, here = None, task.part == 0
            try:
                reduced = Reduced(crystal, item, self.settings.max_atoms)
            except Exception as error:  # pymatgen gives up on a cell in more ways than one
                if here:
                    found.undecided.append(_undecided(number, crystal.id, error))
            else:
                here = zlib.crc32(repr(reduced.counts).encode()) % task.parts == task.part
            yield _Entry(item, crystal, reduced if here else None, here)

    def _find(
        self, number: int, known: _Known, entry: _Entry, found: Found
    ) -> dict[str, Any] | None:
        """The match of a crystal among those known, as a record; None if there is none."""
        new, match = entry.reduced, Match(None, None)
        if twin := known.by_id.get(entry.crystal.id):
            other, other_id, by = twin.item, twin.crystal.id, "id"
            if new and twin.reduced and new.counts == twin.reduced.counts:
                match = self.matcher.measure(twin.reduced, new)
        elif new and (same := self._same(number, known, new, found)):
            other, other_id, by = same.item, same.id, "structure"
            match = self.matcher.measure(same, new)
        else:
            return None
        return {
            "item": entry.item,
            "id": entry.crystal.id,
            "formula": entry.crystal.to_ase().get_chemical_formula("metal", empirical=True),
            "set": number,
            "other": other,
            "other_id": other_id,
            "by": by,
            **asdict(match),
        }

    def _same(self, number: int, known: _Known, new: Reduced, found: Found) -> Reduced | None:
        """A crystal that the matcher takes for the same, the most similar ones tried first."""
        group = known.groups.get(new.counts)
        if not group:
            return None
        found.pairs["sites"] += len(group)
        for other in group.nearest(new):
            if not self.matcher.may_fit(other, new):
                continue
            found.pairs["compared"] += 1
            try:
                if self.matcher.fits(other, new):
                    found.pairs["matched"] += 1
                    return other
            except Exception as error:  # as above
                found.undecided.append(_undecided(number, new.id, error))
        return None


def _undecided(number: int, id: str, error: Exception) -> dict[str, Any]:
    return {"set": number, "id": id, "why": f"{type(error).__name__}: {error}"}


class Formulas:
    """Reads the reduced formulas of crystals, as text."""

    def __init__(self, sets: Mapping[int, Dataset]) -> None:
        self.sets = sets

    def __call__(self, work: tuple[int, list[int]]) -> list[str] | str:
        """Of the items of one set; or what is wrong with one of them."""
        number, items = work
        out = []
        for _, crystal in self.sets[number].read(items):
            if not isinstance(crystal, Crystal):
                return f"{self.sets[number].root}: {crystal}"
            elements, counts = np.unique(crystal.numbers, return_counts=True)
            counts //= np.gcd.reduce(counts)
            names = (f"{chemical_symbols[z]}{n}" for z, n in zip(elements, counts, strict=True))
            out.append("".join(names))
        return out


def search(
    dataset: Dataset,
    references: Sequence[Reference],
    settings: Duplicates,
    journal: str | os.PathLike,
    *,
    workers: int = 0,
    progress: bool = False,
) -> Found:
    """The duplicates in a data set.

    Args:
        journal: file of outcomes, formula by formula. What an interrupted call with the same data
            and settings left there is not done again.
        workers: processes; 0 takes every core.

    Raises:
        ValueError: a crystal cannot be read, a reference has none that counts, or the label to keep
            by does not exist.
    """
    for reference in references:
        _check(reference)
    tasks = _tasks(dataset, references, settings, workers, progress)
    decide = Decide(dataset, references, settings)
    log = Journal(Path(journal), OUTCOME)
    todo = [task for task in tasks if task.key not in log.done]
    bar = tqdm(total=len(tasks), desc="comparing", unit=" formulas", disable=not progress)
    with contextlib.closing(log), bar, Workers(decide, workers) as pool:
        bar.update(len(tasks) - len(todo))
        for key, outcome in pool.map(todo, chunk=1, ordered=False):
            log.add(key, vars(outcome))
            bar.update()
    found = Found(pairs=Counter(formula=sum(t.pairs(settings.within) for t in tasks if not t.part)))
    for task in tasks:
        outcome = Found(**log.done[task.key])
        _check_outcome(outcome, task, journal)
        found.matches += outcome.matches
        found.undecided += outcome.undecided
        found.pairs.update(outcome.pairs)
    found.matches.sort(key=lambda m: (m["item"], m["set"]))
    found.undecided.sort(key=lambda u: (u["set"], u["id"]))
    return found


def _check_outcome(found: Found, task: Task, journal: str | os.PathLike) -> None:
    """Raises ValueError if an outcome that was kept is not one of the task."""
    sets = {n: {*items} for n, items in enumerate(task.references)} | {WITHIN: {*task.items}}
    for match in found.matches:
        own = match["item"] in sets[WITHIN]
        if not own or match["other"] not in sets.get(match["set"], ()):
            raise ValueError(f"{journal} is not of this search: remove its directory")
    if any(u["set"] not in sets for u in found.undecided):
        raise ValueError(f"{journal} is not of this search: remove its directory")


def _check(reference: Reference) -> None:
    if not len(reference.items):
        sizes = ", ".join(f"{n} {split}" for split, n in reference.dataset.manifest.splits.items())
        raise ValueError(
            f"{reference.name} has no crystals in {', '.join(reference.splits)}, only {sizes}: say "
            "with duplicates.splits=[…] which count"
        )


def _tasks(
    dataset: Dataset,
    references: Sequence[Reference],
    settings: Duplicates,
    workers: int,
    progress: bool,
) -> list[Task]:
    """A task for each formula that may hold duplicates, large ones first."""
    sets = {n: r.dataset for n, r in enumerate(references)} | {WITHIN: dataset}
    items = {n: r.items for n, r in enumerate(references)} | {WITHIN: np.arange(len(dataset))}
    work = [
        (number, chosen[start : start + _SCANNED].tolist())
        for number, chosen in items.items()
        for start in range(0, len(chosen), _SCANNED)
    ]
    total = sum(map(len, items.values()))
    bar = tqdm(total=total, desc="reading formulas", unit=" crystals", disable=not progress)
    table: dict[str, dict[int, list[int]]] = defaultdict(lambda: {n: [] for n in items})
    with bar, Workers(Formulas(sets), workers) as pool:
        for (number, chunk), formulas in zip(work, pool.map(work, chunk=1), strict=True):
            if isinstance(formulas, str):
                raise ValueError(f"{formulas}; look with launch/prepare.py verify=DIR")
            for item, formula in zip(chunk, formulas, strict=True):
                table[formula][number].append(item)
            bar.update(len(chunk))
    rank = _rank(dataset, settings)
    tasks = []
    for formula, found in table.items():
        own = sorted(found.pop(WITHIN), key=rank.__getitem__)
        known = list(found.values())
        if (own and any(known)) or (settings.within and len(own) > 1):
            parts = 1 + (len(own) + sum(map(len, known))) // _LARGE
            tasks += [Task(f"{formula} {i}", own, known, i, parts) for i in range(parts)]
    return sorted(tasks, key=lambda t: (-len(t.items) - sum(map(len, t.references)), t.key))


def _rank(dataset: Dataset, settings: Duplicates) -> np.ndarray:
    """[N], place of every item in the order in which they are kept."""
    rule, _, label = settings.keep.partition(":")
    value = np.zeros(len(dataset))
    if rule != "first":
        value = dataset.targets_of(label) * (1 if rule == "lowest" else -1)
    split = np.concatenate([np.full(dataset.manifest.splits[s], i) for i, s in enumerate(SPLITS)])
    rank = np.empty(len(dataset), dtype=np.int64)
    rank[np.lexsort((value, -split))] = np.arange(len(dataset))  # stable; NaN comes last
    return rank
