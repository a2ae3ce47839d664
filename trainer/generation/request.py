"""What crystals are asked for, as single samples and as chunks of work."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ase.data import chemical_symbols

from crysforge.datapipe.cif.formula import parse_formula
from crysforge.datapipe.crystals.crystal import Crystal, crystal_key
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.generation.config import parse_units
from crysforge.trainer.stages.base import Stage
from crysforge.trainer.stages.made import Wanted

MOST_CELL = 1000
"""Atoms of the largest cell that is asked for."""


@dataclass(frozen=True)
class Asked:
    """One sample, and what it is a sample of."""

    wanted: Wanted
    formula: str
    """What was asked for; empty where the model chooses."""
    units: int
    """Formula units in the cell, Z; 0 where the model chooses."""
    sample: int
    """Number among the samples of the same question, from 0."""
    target: str = ""
    """Id of the crystal whose structure is to be found, if one is."""


def of_formula(formula: str, units: Sequence[int], samples: int, seed: int) -> list[Asked]:
    """Samples of a formula, for each number of formula units.

    Raises:
        ValueError: no formula, or a cell of more than `MOST_CELL` atoms.
    """
    counts = composition(formula)
    atoms, out = sum(counts.values()), []
    for z in units:
        if atoms * z > MOST_CELL:
            raise ValueError(f"{z} units of {formula} are {atoms * z} atoms: at most {MOST_CELL}")
        numbers = tuple(n for n, count in sorted(counts.items()) for _ in range(count * z))
        for sample in range(samples):
            name = f"{formula}-z{z}-{sample:04d}"
            key = crystal_key(seed, 0, f"{sorted(counts.items())}/{z}/{sample}")
            out.append(Asked(Wanted(name=name, key=key, numbers=numbers), formula, z, sample))
    return out


def of_table(path: Path, units: Sequence[int], samples: int, seed: int) -> list[Asked]:
    """Samples of the formulas in a CSV file: a column `formula`, and `z` if it has one.

    Raises:
        ValueError: it cannot be read, has no such column, or a line is no formula.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"input {path} cannot be read: {error}") from None
    if not rows or "formula" not in rows[0]:
        raise ValueError(f"input {path} needs a head line with a column 'formula'")
    out: dict[str, Asked] = {}
    for number, row in enumerate(rows, start=2):
        try:
            each = parse_units(row["z"]) if row.get("z") else units
            found = of_formula(str(row["formula"]).strip(), each, samples, seed)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        out |= {a.wanted.name: a for a in found}  # a formula may be there twice
    return list(out.values())


def of_targets(data: Dataset, split: str, samples: int, seed: int, most: int) -> list[Asked]:
    """Samples of what is in the cells of a data set's crystals: at most so many of them, evenly
    spread; 0: all.

    Raises:
        ValueError: the split has no crystals.
    """
    items = data.split_items(split)
    if not len(items):
        raise ValueError(f"data set {data.root} has no crystals in its {split!r} split")
    if most:
        items = items[:: math.ceil(len(items) / most)]
    out = []
    for _, crystal in data.read(items.tolist()):
        if not isinstance(crystal, Crystal):
            continue
        numbers = tuple(sorted(crystal.numbers.tolist()))
        formula = crystal.to_ase().get_chemical_formula("metal", empirical=True)
        units = len(crystal) // sum(composition(formula).values())
        for sample in range(samples):
            name = f"{crystal.id}-{sample:04d}"
            key = crystal_key(seed, 0, f"target {crystal.id}/{sample}")
            wanted = Wanted(name=name, key=key, numbers=numbers)
            out.append(Asked(wanted, formula, units, sample, crystal.id))
    return out


def of_nothing(
    stage: Stage, count: int, atoms: int | None, elements: Sequence[int], seed: int
) -> list[Asked]:
    """Samples whose elements the model chooses, of so many atoms or of sizes as in training."""
    keys = [crystal_key(seed, 0, f"sample {i}") for i in range(count)]
    sizes = [atoms] * count if atoms else stage.sizes(torch.tensor(keys, dtype=torch.int64))
    return [
        Asked(
            Wanted(name=f"{i:07d}", key=key, atoms=size, elements=tuple(sorted(elements))),
            "",
            0,
            i,
        )
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True))
    ]


def chunks(asked: Sequence[Asked], most_atoms: int) -> list[list[Asked]]:
    """Fixed parts of the work, of cells alike in size: each at most so many atoms, and ten times as
    many pairs of atoms; a larger cell goes alone. They do not depend on ranks or on what is done
    already: a part that is done anew gives the same bits."""
    out: list[list[Asked]] = []
    atoms = pairs = 0
    for one in sorted(asked, key=lambda a: len(a.wanted)):  # stable
        n = len(one.wanted)
        atoms, pairs = atoms + n, pairs + n * n
        if not out or atoms > most_atoms or pairs > 10 * most_atoms:
            out.append([])
            atoms, pairs = n, n * n
        out[-1].append(one)
    return out


def composition(formula: str) -> dict[int, int]:
    """Atoms by atomic number of one formula unit, as it is written.

    Raises:
        ValueError: it is no formula of whole numbers of known elements.
    """
    found = parse_formula(formula)
    counts = dict(found.counts) if found else {}
    whole = {z: round(count) for z, count in counts.items()}
    if not whole or any(abs(whole[z] - n) > 1e-6 or n < 1 for z, n in counts.items()):
        raise ValueError(
            f"{formula!r} is no formula: give elements and whole numbers, such as LiFePO4"
        )
    return whole


def outside(
    asked: Sequence[Asked], elements: frozenset[int], atoms: tuple[float, float] | None
) -> Iterator[str]:
    """What of it is unlike all that a model learned from, each once, in words."""
    wanted = {z for a in asked for z in (*a.wanted.numbers, *a.wanted.elements)}
    for z in sorted(wanted - elements if elements else ()):
        yield f"element {chemical_symbols[z]}"
    for size in sorted({len(a.wanted) for a in asked}):
        if atoms and not atoms[0] <= size <= atoms[1]:
            yield f"{size} atoms in a cell ({atoms[0]:g} to {atoms[1]:g})"
