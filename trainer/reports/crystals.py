"""Errors by what a crystal is: its number of atoms, its elements, its space group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.symmetry import space_group
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.remote import is_below, is_remote
from crysforge.trainer.evaluation.compare import Arm, lines_of, varying
from crysforge.trainer.evaluation.results import Result
from crysforge.trainer.evaluation.statistics import improvement, summarise
from crysforge.trainer.evaluation.suite import Suite
from crysforge.trainer.reports.formats import NOTHING, Entry, Number, Table, places

BUCKETS = (("N ≤ 5", 1, 5), ("5 < N < 10", 6, 9), ("N ≥ 10", 10, 10**9))
"""Number of atoms per cell, both ends included. Source: Fig. 8 of the CrysLDNet paper, where
crystals of ten atoms belong nowhere."""
SYSTEMS = (
    ("triclinic", 1, 2),
    ("monoclinic", 3, 15),
    ("orthorhombic", 16, 74),
    ("tetragonal", 75, 142),
    ("trigonal", 143, 167),
    ("hexagonal", 168, 194),
    ("cubic", 195, 230),
)
"""Crystal systems and their space-group numbers, both ends included."""


@dataclass(frozen=True)
class Facts:
    """What errors are grouped by, of the crystals of one data set's split."""

    row: dict[str, int]
    """Row of each crystal, by id."""
    atoms: np.ndarray
    """[n], atoms per cell."""
    elements: np.ndarray
    """[n, 119] bool, which atomic numbers occur."""
    groups: np.ndarray
    """[n], space-group numbers; 0 where they were not looked for."""

    def errors(self, result: Result) -> np.ndarray:
        """Absolute errors of a run in the rows' order, [n]; NaN where it has none."""
        errors = np.full(len(self.atoms), np.nan)
        for id, error in result.predictions.error_of.items():
            if id in self.row:
                errors[self.row[id]] = error
        return errors


def facts_of(
    results: Sequence[Result], folders: Iterable[str], below: str, split: str, groups: bool
) -> tuple[dict[str, Facts], list[str]]:
    """Facts by fingerprint of the data sets behind results, and a note on each that is not there.

    A data set is looked for where its runs found it, if that is a path or a URL `below` one that
    the user has typed, then in `folders`.
    """
    found: dict[str, Facts] = {}
    notes: list[str] = []
    for fingerprint in dict.fromkeys(r.fingerprint for r in results):
        ours = [r for r in results if r.fingerprint == fingerprint]
        named = [r.data for r in ours if not is_remote(r.data) or is_below(r.data, below)]
        places_to_look = [*dict.fromkeys(named), *folders]
        dataset = next(filter(None, (_opened(p, fingerprint) for p in places_to_look)), None)
        if dataset is None:
            where, say = f"is no longer at {ours[0].data or '(unknown)'}", "data=[DIR]"
            if is_remote(ours[0].data) and not is_below(ours[0].data, below):
                where = f"was at {ours[0].data}, which is not opened unless you say so"
                say = "data_dir=URL of what is above it"
            notes.append(
                f"the data set of {ours[0].run.name} {where}: errors by atoms, element and space "
                f"group are left out (say where it is with {say})"
            )
            continue
        wanted = {id for r in ours for id in r.predictions.ids}
        found[fingerprint] = _read(dataset, split, wanted, groups)
    return found, notes


def _opened(path: str, fingerprint: str) -> Dataset | None:
    try:
        dataset = Dataset.open(path) if path else None
    except ValueError:
        return None
    return dataset if dataset and dataset.manifest.fingerprint == fingerprint else None


def _read(dataset: Dataset, split: str, wanted: set[str], groups: bool) -> Facts:
    row: dict[str, int] = {}
    atoms: list[int] = []
    elements: list[np.ndarray] = []
    numbers: list[int] = []
    part = np.arange(len(dataset)) if dataset.folds else dataset.split_items(split)
    items, total = dataset.read(part), len(part)
    for _, crystal in tqdm(items, total=total, desc="crystals", leave=False, mininterval=1):
        if not isinstance(crystal, Crystal) or crystal.id not in wanted:
            continue
        row[crystal.id] = len(row)
        atoms.append(len(crystal))
        elements.append(np.bincount(crystal.numbers, minlength=119) > 0)
        numbers.append(space_group(crystal) if groups else 0)
    return Facts(
        row,
        np.array(atoms, dtype=np.int64),
        np.array(elements, dtype=bool).reshape(-1, 119),
        np.array(numbers, dtype=np.int64),
    )


def _data_sets(line: Sequence[Arm]) -> list[str]:
    """Fingerprints of what some arms were judged on."""
    return list(dict.fromkeys(r.fingerprint for arm in line for r in arm.results.values()))


def facts_behind(line: Sequence[Arm], facts: Mapping[str, Facts]) -> Facts | None:
    """Facts of all crystals that some arms were judged on: replicates may have data sets of their
    own (folds). None where one of these is not there."""
    behind = _data_sets(line)
    if not behind or not facts.keys() >= set(behind):
        return None
    parts = [facts[f] for f in behind]
    if len(parts) == 1:
        return parts[0]
    chosen: dict[str, tuple[int, int]] = {}  # part and row of each crystal
    for number, part in enumerate(parts):
        for id, row in part.row.items():
            chosen.setdefault(id, (number, row))
    return Facts(
        {id: row for row, id in enumerate(chosen)},
        *(
            np.stack([getattr(parts[number], name)[row] for number, row in chosen.values()])
            for name in ("atoms", "elements", "groups")
        ),
    )


def arm_errors(arm: Arm, facts: Facts) -> np.ndarray:
    """Absolute errors of each replicate, [seeds, n]; NaN where it has none."""
    return np.stack([facts.errors(r) for r in arm.results.values()])


def means_inside(errors: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """MAE of each replicate over the crystals inside, [seeds]; NaN of none, from [seeds, n]."""
    count = np.isfinite(errors[:, inside]).sum(axis=1)
    total = np.nansum(errors[:, inside], axis=1)
    return np.divide(total, count, out=np.full(len(errors), np.nan), where=count > 0)


def atoms_table(suite: Suite, arms: Sequence[Arm], facts: dict[str, Facts]) -> Table:
    """MAE of each arm by number of atoms per cell, without those whose data set is not there."""
    known = [a for a in arms if a.results and facts.keys() >= set(_data_sets([a]))]
    factors = varying(known, [suite.compared])
    values = list(dict.fromkeys(a.values.get(suite.compared, "") for a in known))
    others = [v for v in values if v != suite.baseline] if suite.compared else []
    body: list[list[Entry]] = []
    for line in lines_of(suite, known):
        facts_here = facts_behind(line, facts)
        assert facts_here is not None
        errors = {a.values.get(suite.compared, ""): arm_errors(a, facts_here) for a in line}
        for title, low, high in BUCKETS:
            inside = (facts_here.atoms >= low) & (facts_here.atoms <= high)
            each = {v: means_inside(e, inside) for v, e in errors.items()}
            each = {v: m[np.isfinite(m)] for v, m in each.items()}
            found = {v: summarise(m.tolist()) for v, m in each.items() if len(m)}
            if not found:
                continue
            digits, best = (
                places([s.mean for s in found.values()]),
                min(s.mean for s in found.values()),
            )
            entries: list[Entry] = [*line[0].key(factors), title, int(inside.sum())]
            for v in values:
                if v in found:
                    bold = len(found) > 1 and found[v].mean == best
                    entries.append(Number(found[v].mean, digits, found[v].std, bold))
                else:
                    entries.append(NOTHING)
            base = found.get(suite.baseline)
            entries += [
                Number(improvement(found[v].mean, base.mean), 1) if base and v in found else NOTHING
                for v in others
            ]
            body.append(entries)
    columns = [*factors, "atoms per cell", "crystals"]
    columns += [*(v or "MAE" for v in values), *(f"{v}: gain / %" for v in others)]
    title = f"{suite.title}: MAE by number of atoms, mean ± standard deviation over seeds"
    return Table("by_atoms", title, columns, body, len(factors) + 1)
