"""Crystals that are nearly the same, data sets of them, and runs that leave duplicates out."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from pymatgen.analysis.structure_matcher import StructureMatcher

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.duplicates.records import Duplicates
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.datapipe.storage.manifest import SPLITS

PLAIN = StructureMatcher(stol=0.1, angle_tol=10, ltol=0.3)

FCC = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
HEX = np.array([[1, 0, 0], [-0.5, 3**0.5 / 2, 0], [0, 0, 1.63]])
AB = {  # cell, first kind's sites, second kind's
    "rocksalt": (5 * FCC, [[0, 0, 0]], [[0.5, 0.5, 0.5]]),
    "zincblende": (5.5 * FCC, [[0, 0, 0]], [[0.25, 0.25, 0.25]]),
    "cesium chloride": (3.2 * np.eye(3), [[0, 0, 0]], [[0.5, 0.5, 0.5]]),
    "wurtzite": (
        3.9 * HEX,
        [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5]],
        [[1 / 3, 2 / 3, 0.375], [2 / 3, 1 / 3, 0.875]],
    ),
    "nickel arsenide": (
        3.6 * HEX,
        [[0, 0, 0], [0, 0, 0.5]],
        [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]],
    ),
}


def polymorph(kind: str, first: int, second: int, id: str) -> Crystal:
    cell, a, b = AB[kind]
    return Crystal.create(id, [first] * len(a) + [second] * len(b), a + b, cell)


def other_view(crystal: Crystal, rng, id: str) -> Crystal:
    """The same crystal in a larger, turned, moved, resized cell with its atoms in another order."""
    structure = crystal.to_pymatgen()
    structure.make_supercell([[1, 1, 0], [0, 1, 0], [0, 0, int(rng.integers(1, 3))]])
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = rng.permutation(len(structure))
    frac = (structure.frac_coords + rng.random(3))[order]
    numbers = np.array(structure.atomic_numbers)[order]
    return Crystal.create(id, numbers, frac, 1.1 * structure.lattice.matrix @ turn)


def distorted(crystal: Crystal, rng, strain: float, shift: float, id: str) -> Crystal:
    """The crystal under a random strain, its atoms moved by up to `shift` Å along each axis."""
    cell = crystal.lattice @ (np.eye(3) + rng.uniform(-strain, strain, (3, 3)))
    moved = rng.uniform(-shift, shift, (len(crystal), 3)) @ np.linalg.inv(cell)
    return Crystal.create(id, crystal.numbers, crystal.frac_coords + moved, cell)


def variants(rng, count: int, prefix: str) -> list[Crystal]:
    """Crystals of three formulas, many of them nearly the same."""
    out = []
    for i in range(count):
        kind = list(AB)[rng.integers(len(AB))]
        pair = [(11, 17), (12, 8), (30, 16)][rng.integers(3)]
        crystal = other_view(polymorph(kind, *pair, ""), rng, "")
        out.append(distorted(crystal, rng, *[(0, 0), (0.05, 0.1), (0.15, 0.3)][i % 3], ""))
    return [replace(c, id=f"{prefix}-{i}") for i, c in enumerate(out)]


def store(root: Path, **crystals: list[Crystal]) -> str:
    """A data set with these splits."""
    names = sorted({name for group in crystals.values() for c in group for name in c.targets})
    with DatasetWriter(root, names, dict.fromkeys(names, "eV"), shard_size=7) as writer:
        for split in SPLITS:
            for crystal in crystals.get(split, []):
                writer.add(split, crystal)
        writer.finish({"made": "by a test"})
    return str(root)


def duplicates(**values) -> Duplicates:
    return Duplicates(**{"splits": list(SPLITS)} | values)


def run(source: str, output: Path, *references: str, workers: int = 1, **values) -> set[str]:
    """Ids that are left out."""
    config = PrepareConfig(
        input=source,
        output=str(output),
        dedup=list(references),
        duplicates=duplicates(**values),
        workers=workers,
        progress=False,
    )
    prepare(config)
    return ids(source) - ids(output)


def ids(root) -> set[str]:
    dataset = Dataset.open(root)
    return {crystal.id for _, crystal in dataset.read(range(len(dataset)))}


def rows(output: Path, name: str = "matches.csv") -> list[dict[str, str]]:
    with open(output / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def report(output: Path) -> dict:
    return json.loads((output / "dedup.json").read_text("utf-8"))


def same(a: Crystal, b: Crystal) -> bool:
    """The definition."""
    return PLAIN.fit(a.to_pymatgen(), b.to_pymatgen())


def make_sets(root: Path) -> dict:
    """Two data sets with many crystals in common, their crystals, and the plain answers."""
    rng = np.random.default_rng(5)
    new, known = variants(rng, 24, "new"), variants(rng, 9, "known")
    kept: list[Crystal] = []
    within = set()
    for crystal in new:
        if any(same(other, crystal) for other in kept):
            within.add(crystal.id)
        else:
            kept.append(crystal)
    return {
        "new": store(root / "new", train=new),
        "known": store(root / "known", train=known[:3], val=known[3:5], test=known[5:]),
        "crystals": new,
        "against": {c.id for c in new if any(same(other, c) for other in known)},
        "against test": {c.id for c in new if any(same(other, c) for other in known[5:])},
        "within": within,
    }
