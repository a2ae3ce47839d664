"""Test errors of finetuning runs, and the same on crystals whose formula training never saw.

    python benchmarks/disjoint.py data=DIR runs=[RUN,RUN,…]

Reduced formulas of the whole training split are excluded (pretraining saw all of it). Prints a
table, then JSON.
"""

from __future__ import annotations

import csv
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import show
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run


@dataclass(kw_only=True)
class DisjointConfig:
    """Settings of the comparison."""

    data: str = ""
    """Data set the runs were finetuned on."""
    runs: list[str] = field(default_factory=list)
    """Finetuning runs of one target."""


def formula(crystal: Crystal) -> tuple:
    """The reduced formula, as sorted (element, count) pairs."""
    counts = Counter(crystal.numbers.tolist())
    divisor = reduce(math.gcd, counts.values())
    return tuple(sorted((z, n // divisor) for z, n in counts.items()))


def formulas(dataset: Dataset, split: str) -> dict[str, tuple]:
    """Formula of every crystal of a split, by id."""
    found = (crystal for _, crystal in dataset.read(dataset.split_items(split)))
    return {c.id: formula(c) for c in found if isinstance(c, Crystal)}


def main() -> None:
    config = parse(DisjointConfig, __doc__)
    required(config, "data", "runs")
    dataset = Dataset.open(config.data)
    known = set(formulas(dataset, "train").values())
    new = {id for id, f in formulas(dataset, "test").items() if f not in known}
    rows = []
    for path in config.runs:
        with open(Path(path) / "predictions_test.csv", newline="") as file:
            errors = {
                r["id"]: abs(float(r["prediction"]) - float(r["target"]))
                for r in csv.DictReader(file)
            }
        unseen = [e for id, e in errors.items() if id in new]
        rows.append(
            {
                "run": Path(path).name,
                "mae": sum(errors.values()) / len(errors),
                "crystals": len(errors),
                "mae_new_formulas": sum(unseen) / max(len(unseen), 1),
                "crystals_new_formulas": len(unseen),
            }
        )
    show(rows, {"data": config.data})


if __name__ == "__main__":
    run(main)
