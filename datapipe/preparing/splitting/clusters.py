"""Groups of crystals that must not be torn apart: of one formula, of one set of elements, or of one
structure."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from crysforge.datapipe.common.checked import Count, sized
from crysforge.datapipe.common.journal import Journal
from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.duplicates.matcher import Group, Matcher, Reduced
from crysforge.datapipe.preparing.duplicates.records import WITHIN, Duplicates, FormulaTask
from crysforge.datapipe.preparing.duplicates.search import read_formulas, tasks_of
from crysforge.datapipe.storage.dataset import Dataset


@dataclass
class Linked:
    """What a task has found.

    Attributes:
        pairs: items that are the same structure; with them all others that are, too.
        undecided: items that could not be compared.
    """

    pairs: list[tuple[int, int]] = field(default_factory=list)
    undecided: list[int] = field(default_factory=list)


LINKED = {"pairs": list[Annotated[list[Count], sized(2, 2)]], "undecided": list[Count]}
"""`Linked` as it is kept, formula by formula."""


class Link:
    """Finds which crystals of a formula are the same structure; this is what workers do."""

    def __init__(self, dataset: Dataset, settings: Duplicates) -> None:
        self.dataset, self.settings = dataset, settings
        self.matcher = Matcher(settings.stol, settings.angle_tol, settings.ltol)

    def __call__(self, task: FormulaTask) -> tuple[str, Linked]:
        found, union = Linked(), _Union()
        known: dict[tuple, Group] = defaultdict(Group)
        for crystal in self._by_id(task):
            if not isinstance(crystal, Reduced):
                if task.part == 0:
                    found.undecided.append(crystal)
                continue
            if not task.is_here(crystal.counts):
                continue
            for other in known[crystal.counts].nearest(crystal):
                if union.root(other.item) != union.root(crystal.item) and self._same(
                    other, crystal, found
                ):
                    union.join(other.item, crystal.item)
                    found.pairs.append((other.item, crystal.item))
            known[crystal.counts].add(crystal)
        return task.key, found

    def _by_id(self, task: FormulaTask) -> list[Reduced | int]:
        """The crystals of a task, reduced, in an order that their ids give; the item of one that
        cannot be reduced."""
        entries: list[tuple[str, Reduced | int]] = []
        for item, crystal in self.dataset.read(task.items):
            if not isinstance(crystal, Crystal):
                raise OSError(f"{self.dataset.root} changed while it was read: {crystal}")
            try:
                entries.append((crystal.id, Reduced(crystal, item, self.settings.max_atoms)))
            except Exception:  # pymatgen gives up on a cell in more ways than one
                entries.append((crystal.id, item))
        return [entry for _, entry in sorted(entries, key=lambda e: e[0])]

    def _same(self, known: Reduced, new: Reduced, found: Linked) -> bool:
        if not self.matcher.may_fit(known, new):
            return False
        try:
            return self.matcher.fits(known, new)
        except Exception:  # as above
            found.undecided.append(new.item)
            return False


class _Union:
    """Which numbers have been joined."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def root(self, number: int) -> int:
        path = []
        while (parent := self._parent.get(number, number)) != number:
            path.append(number)
            number = parent
        self._parent.update(dict.fromkeys(path, number))
        return number

    def join(self, one: int, other: int) -> None:
        self._parent[self.root(other)] = self.root(one)


def groups_of(
    dataset: Dataset,
    by: str | None,
    settings: Duplicates,
    journal: Path,
    workers: int = 0,
    progress: bool = False,
) -> tuple[list[str], int]:
    """Name of the group of every crystal, and how many could not be compared.

    The names follow from the crystals of the group alone: the reduced formula, the elements, or the
    formula and the smallest id. A cluster holds all crystals that are the same structure as another
    of it, by steps. Where one of a formula cannot be compared, all of that formula are one cluster.

    Args:
        by: `formula`, `chemical_system` or `cluster`; None: every crystal is a group.
        settings: what the same structure is. journal: file of what is found, see `dedup.search`.

    Raises:
        ValueError: a crystal cannot be read.
    """
    if by is None:
        return _ids(dataset), 0
    everything = {WITHIN: np.arange(len(dataset))}
    found = read_formulas({WITHIN: dataset}, everything, workers, progress)
    formulas = [formula for _, _, formula in found]
    if by == "formula":
        return formulas, 0
    if by == "chemical_system":
        return ["-".join(sorted(re.findall("[A-Z][a-z]?", f))) for f in formulas], 0
    union = _Union()
    undecided: set[int] = set()
    for linked in _link(dataset, settings, journal, workers, progress):
        undecided.update(linked.undecided)
        for one, other in linked.pairs:
            union.join(one, other)
    torn = {formulas[item] for item in undecided}
    first: dict[str, int] = {}
    for item, formula in enumerate(formulas):
        if formula in torn:
            union.join(first.setdefault(formula, item), item)
    ids = _ids(dataset)
    least: dict[int, str] = {}
    for item, id in enumerate(ids):
        root = union.root(item)
        least[root] = min(least.get(root, id), id)
    names = [f"{formulas[i]} {least[union.root(i)]}" for i in range(len(dataset))]
    return names, len(undecided)


def _link(
    dataset: Dataset, settings: Duplicates, journal: Path, workers: int, progress: bool
) -> list[Linked]:
    settings = replace(settings, within=True, keep="first")
    tasks = tasks_of(dataset, [], settings, workers, progress)
    log = Journal(journal, LINKED)
    todo = [task for task in tasks if task.key not in log.done]
    bar = tqdm(total=len(tasks), desc="comparing", unit=" formulas", disable=not progress)
    with contextlib.closing(log), bar, Workers(Link(dataset, settings), workers) as pool:
        bar.update(len(tasks) - len(todo))
        for key, outcome in pool.map(todo, chunk=1, ordered=False):
            log.add(key, vars(outcome))
            bar.update()
    return [Linked(**log.done[task.key]) for task in tasks]


def _ids(dataset: Dataset) -> list[str]:
    out: list[str] = []
    for _, crystal in dataset.read(range(len(dataset))):
        if not isinstance(crystal, Crystal):
            raise ValueError(f"{dataset.root}: {crystal}")
        out.append(crystal.id)
    return out


def sizes(groups: Sequence[str]) -> dict[str, Any]:
    """How many groups there are, and crystals in the largest."""
    counts = np.unique(np.array(groups, dtype=object), return_counts=True)[1]
    return {"groups": len(counts), "largest": int(counts.max())}


def in_words(split: Mapping[str, Any]) -> list[str]:
    """What a manifest says of groups and classes, in words."""
    lines = []
    if "groups" in split:
        text = (
            f"{split['groups']} groups by {split['split_by']}, each in one part; the largest has "
        )
        text += f"{split['largest']} crystals"
        if split.get("undecided"):
            text += (
                f"; {split['undecided']} crystals could not be compared: their formulas are whole"
            )
        lines.append(text)
    if "stratified_by" in split:
        lines.append(f"classes of {split['stratified_by']} are alike in all parts")
    return lines
