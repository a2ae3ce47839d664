"""The duplicates among the crystals of one reduced formula: what worker processes find."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.duplicates.matcher import Group, Match, Matcher, Reduced
from crysforge.datapipe.preparing.duplicates.records import (
    WITHIN,
    Duplicates,
    FormulaTask,
    Found,
    Reference,
)
from crysforge.datapipe.storage.dataset import Dataset


@dataclass(frozen=True)
class _Entry:
    """A crystal of a task."""

    item: int
    crystal: Crystal
    reduced: Reduced | None
    """None: it cannot be reduced, or belongs to another part."""
    decided_here: bool


class _Known:
    """Index of candidate crystals, grouped by primitive-cell composition."""

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

    def __call__(self, task: FormulaTask) -> tuple[str, Found]:
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

    def _read(
        self, number: int, items: list[int], task: FormulaTask, found: Found
    ) -> Iterator[_Entry]:
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
                here = task.is_here(reduced.counts)
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
