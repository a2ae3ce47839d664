"""Finds the crystals of a data set that other data sets have too, or that occur in it twice.

The crystals of one reduced formula are one task, and workers do many at once. Outcomes go to a
journal beside the output, so that a killed run continues where it was; they depend on the crystals
and the settings alone, not on the number of workers.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crysforge.datapipe.common.journal import Journal
from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.preparing.duplicates.decide import Decide, Formulas
from crysforge.datapipe.preparing.duplicates.records import (
    OUTCOME,
    WITHIN,
    Duplicates,
    FormulaTask,
    Found,
    Reference,
)
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import SPLITS

_SCANNED = 500
"""Records whose formulas are read at a time."""

_LARGE = 1000
"""Crystals of one formula beyond which it becomes several tasks."""


def read_formulas(
    sets: Mapping[int, Dataset], items: Mapping[int, np.ndarray], workers: int, progress: bool
) -> Iterator[tuple[int, int, str]]:
    """(set, item, reduced formula as text) of the items of each set, in order.

    Raises:
        ValueError: one cannot be read.
    """
    work = [
        (number, chosen[start : start + _SCANNED].tolist())
        for number, chosen in items.items()
        for start in range(0, len(chosen), _SCANNED)
    ]
    total = sum(map(len, items.values()))
    bar = tqdm(total=total, desc="reading formulas", unit=" crystals", disable=not progress)
    with bar, Workers(Formulas(sets), workers) as pool:
        for (number, chunk), formulas in zip(work, pool.map(work, chunk=1), strict=True):
            if isinstance(formulas, str):
                raise ValueError(f"{formulas}; look with launch/prepare.py verify=DIR")
            for item, formula in zip(chunk, formulas, strict=True):
                yield number, item, formula
            bar.update(len(chunk))


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
    tasks = tasks_of(dataset, references, settings, workers, progress)
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


def _check_outcome(found: Found, task: FormulaTask, journal: str | os.PathLike) -> None:
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


def tasks_of(
    dataset: Dataset,
    references: Sequence[Reference],
    settings: Duplicates,
    workers: int,
    progress: bool,
) -> list[FormulaTask]:
    """A task for each formula that may hold duplicates, large ones first."""
    sets = {n: r.dataset for n, r in enumerate(references)} | {WITHIN: dataset}
    items = {n: r.items for n, r in enumerate(references)} | {WITHIN: np.arange(len(dataset))}
    table: dict[str, dict[int, list[int]]] = defaultdict(lambda: {n: [] for n in items})
    for number, item, formula in read_formulas(sets, items, workers, progress):
        table[formula][number].append(item)
    rank = _rank(dataset, settings)
    tasks = []
    for formula, found in table.items():
        own = sorted(found.pop(WITHIN), key=rank.__getitem__)
        known = list(found.values())
        if (own and any(known)) or (settings.within and len(own) > 1):
            parts = 1 + (len(own) + sum(map(len, known))) // _LARGE
            tasks += [FormulaTask(f"{formula} {i}", own, known, i, parts) for i in range(parts)]
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
