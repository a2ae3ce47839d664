"""Speed of deduplication on one core, against the plain matcher, and how long large sets take.

    python benchmarks/dedup.py data=DIR against=DIR        data sets made by launch/prepare.py
    python benchmarks/dedup.py data=DIR                    duplicates within one
    … formulas=1000 seed=1

All formulas are read, and a random sample of those that pairs of crystals share is worked on in
four ways: `plain`, StructureMatcher.fit on the structures as they are, for every pair of equal
formula; `reduced`, the same on structures reduced once; `tested`, with the tests of
`Matcher.may_fit` before the matcher; and `prepare`, as it does it: reading, reducing, testing, the
first match decides, displacements measured. All must name the same duplicates: `missed` and `extra`
count the differences. Times are CPU time of one process.

The extrapolation is to sets of `crystals` and `others` (or `crystals` within one): every crystal
is read and reduced, and pairs of equal formula grow with the product of the sizes, as many in
proportion as here.
`no formulas` is StructureMatcher.fit on all pairs; it refuses most by their composition. The last
line of the output is the table as JSON.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pymatgen.analysis.structure_matcher import StructureMatcher

from benchmarks.tables import markdown
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.preparing.duplicates.decide import Decide, Formulas
from crysforge.datapipe.preparing.duplicates.matcher import Match, Matcher, Reduced
from crysforge.datapipe.preparing.duplicates.records import Duplicates, FormulaTask, Reference
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import SPLITS
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set that duplicates would be left out of."""
    against: str = ""
    """Data set that it is compared with, all splits; none: with itself."""
    formulas: int = 400
    """Shared formulas to work on, drawn at random."""
    crystals: int = 380_000
    """Size of `data` to extrapolate to."""
    others: int = 125_000
    """Size of `against` to extrapolate to."""
    seed: int = 0
    """Seed of the draw."""


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data", "formulas")
    new = Dataset.open(config.data)
    known = Dataset.open(config.against) if config.against else None
    started = time.process_time()
    shared = shared_formulas(new, known)
    reading = (len(new) + len(known or ())) / (time.process_time() - started)
    pairs = sum(len(candidates(*sets)) for sets in shared.values())
    product = len(new) * (len(known) if known else (len(new) - 1) / 2)
    drawn = random.Random(config.seed).sample(sorted(shared), min(config.formulas, len(shared)))
    result = measure(new, known, [shared[formula] for formula in drawn])
    rows = extrapolate(config, result, pairs / product, reading)
    print(
        f"{len(new)} crystals against {len(known) if known else 'each other'}: {len(shared)} "
        f"formulas with {pairs} pairs; of {result['formulas']} of them, {result['pairs']} pairs\n"
    )
    print(markdown(rows))
    facts = {
        "data": [config.data, len(new)],
        "against": [config.against, len(known or ())],
        "formulas": len(shared),
        "pairs of equal formula": pairs,
        "formulas read/s": round(reading),
        "sample": result,
        "extrapolation": rows,
    }
    print(json.dumps(facts))
    if result["missed"] or result["extra"]:
        raise SystemExit("the tests before the matcher change the result")


Sets = tuple[list[int], list[int] | None]
"""Items of one formula in both sets; None where there is only one set."""


def shared_formulas(new: Dataset, known: Dataset | None) -> dict[str, Sets]:
    """The items of each formula that has pairs."""
    sets = {0: new} | ({1: known} if known else {})
    table: dict[str, list[list[int]]] = defaultdict(lambda: [[] for _ in sets])
    read = Formulas(sets)
    for number, dataset in sets.items():
        items = list(range(len(dataset)))
        formulas = read((number, items))
        if isinstance(formulas, str):
            raise ValueError(formulas)
        for item, formula in zip(items, formulas, strict=True):
            table[formula][number].append(item)
    both = ((f, (groups[0], groups[1] if known else None)) for f, groups in table.items())
    return {formula: groups for formula, groups in both if candidates(*groups)}


def candidates(items: list[int], others: list[int] | None) -> list[tuple[int, int]]:
    """(known, new) places of all pairs."""
    return [
        (y, x)
        for x in range(len(items))
        for y in (range(x) if others is None else range(len(others)))
    ]


def duplicates(items: list[int], fits: dict[tuple[int, int], bool], within: bool) -> set[int]:
    """Items that match a known one; within a set, one that is kept."""
    out: set[int] = set()
    for (y, x), fit in fits.items():
        if fit and not (within and items[y] in out):
            out.add(items[x])
    return out


class Clock:
    """CPU seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start


class TimedMatcher(Matcher):
    """Tells the time that measuring displacements takes."""

    clock = Clock()

    def measure(self, known: Reduced, new: Reduced) -> Match:
        with self.clock("displacements"):
            return super().measure(known, new)


def measure(new: Dataset, known: Dataset | None, work: Sequence[Sets]) -> dict[str, Any]:
    """Speed of each way, and whether they agree."""
    within = known is None
    settings = Duplicates(splits=list(SPLITS), ids=False, within=within)
    plain = StructureMatcher(stol=settings.stol, ltol=settings.ltol, angle_tol=settings.angle_tol)
    references = [Reference("against", known, SPLITS, {})] if known else []
    decide = Decide(new, references, settings)
    decide.matcher = matcher = TimedMatcher(settings.stol, settings.angle_tol, settings.ltol)
    clock = matcher.clock
    found: dict[str, set[int]] = defaultdict(set)
    strangers, count, pairs, equal = [], 0, 0, 0
    for number, (items, others) in enumerate(work):
        first = crystals(new, items)
        second = crystals(known, others) if known and others is not None else first
        todo = candidates(items, others)
        a, b = ([c.to_pymatgen() for c in group] for group in (first, second))
        with clock("plain"):
            fits = {(y, x): plain.fit(b[y], a[x]) for y, x in todo}
        found["plain"] |= duplicates(items, fits, within)
        with clock("reducing"):
            c = [Reduced(crystal, i) for i, crystal in enumerate(first)]
            d = [Reduced(crystal, i) for i, crystal in enumerate(second)] if known else c
        with clock("reduced"):
            fits = {(y, x): matcher.fits(d[y], c[x]) for y, x in todo}
        found["reduced"] |= duplicates(items, fits, within)
        with clock("tested"):
            fits = {
                (y, x): matcher.may_fit(d[y], c[x]) and matcher.fits(d[y], c[x]) for y, x in todo
            }
        found["tested"] |= duplicates(items, fits, within)
        with clock("prepare"):
            _, outcome = decide(
                FormulaTask(str(number), items, [others] if others is not None else [])
            )
        found["prepare"] |= {match["item"] for match in outcome.matches}
        count += len(c) + (len(d) if known else 0)
        pairs += len(todo)
        equal += sum(d[y].counts == c[x].counts for y, x in todo)
        strangers.append(a[0])
    with clock("strangers"):
        for x, y in itertools.pairwise(strangers):
            plain.fit(x, y)
    seconds = clock.seconds
    speed = {
        f"{name} pairs/s": round(pairs / seconds[name]) for name in ("plain", "reduced", "tested")
    }
    return {
        "formulas": len(work),
        "crystals": count,
        "pairs": pairs,
        "pairs of equal primitive cells": equal,
        "duplicates": len(found["plain"]),
        "missed": len(found["plain"] - set.intersection(*found.values())),
        "extra": len(set.union(*found.values()) - found["plain"]),
        **speed,
        "reducing crystals/s": round(count / seconds["reducing"]),
        "prepare pairs/s": round(pairs / seconds["prepare"]),
        "prepare crystals/s": round(count / seconds["prepare"]),
        "strangers pairs/s": round((len(strangers) - 1) / seconds["strangers"]),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def crystals(dataset: Dataset, items: list[int]) -> list[Crystal]:
    """Crystals of a data set, all of which must be readable."""
    found = []
    for _, crystal in dataset.read(items):
        if isinstance(crystal, BadCrystal):
            raise ValueError(f"{dataset.root}: {crystal}")
        found.append(crystal)
    return found


def extrapolate(
    config: BenchmarkConfig, result: dict[str, Any], density: float, reading: float
) -> list[dict[str, Any]]:
    """Hours that each way takes on sets of the sizes asked for."""
    seconds = result["seconds"]
    if config.against:
        product, count = float(config.crystals * config.others), config.crystals + config.others
    else:
        product, count = config.crystals * (config.crystals - 1) / 2, config.crystals
    pairs = product * density
    once = count * (1 / reading + seconds["reducing"] / result["crystals"])
    each = {name: pairs * value / result["pairs"] for name, value in seconds.items()}
    total = {
        "no formulas": product / result["strangers pairs/s"],
        "plain": count / reading + each["plain"],
        "reduced": once + each["reduced"],
        "tested": once + each["tested"],
        "prepare": once + each["prepare"] - each["reducing"],
    }
    return [
        {
            "way": way,
            "pairs": f"{(product if way == 'no formulas' else pairs):.3g}",
            "hours on 1 core": f"{value / 3600:.3g}",
            "hours on 16 cores": f"{value / 3600 / 16:.3g}",
        }
        for way, value in total.items()
    ]


if __name__ == "__main__":
    run(main)
