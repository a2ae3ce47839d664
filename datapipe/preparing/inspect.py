"""Describes a data set: sizes, elements, volumes, labels, and space groups on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from tqdm import tqdm

from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.crystals.cells import cells_of, extensive_of
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.filters import density
from crysforge.datapipe.crystals.symmetry import space_group
from crysforge.datapipe.graphs.stored import asked
from crysforge.datapipe.preparing.edit_configs import InspectConfig
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import SPLITS

_READ = 200
"""Crystals that a worker reads at a time."""


@dataclass(frozen=True)
class Statistics:
    """What is in a data set of N crystals.

    Attributes:
        splits: crystals per split.
        elements: crystals that contain an atomic number.
        kinds: [N] different elements of each crystal.
        atoms: [N] atoms per cell.
        volume: [N] volume in Å³/atom.
        density: [N] mass density in g/cm³.
        targets: [N] labels by name, NaN where missing. units: by name, where known.
        space_groups: [N] international numbers, by tolerance in Å.
        graphs: specs of the graphs that are stored with the crystals.
        damaged: crystals that cannot be read; these are in `atoms`, `volume` and `targets` only,
            and 0 or NaN elsewhere.
    """

    splits: dict[str, int]
    elements: dict[int, int]
    kinds: np.ndarray
    atoms: np.ndarray
    volume: np.ndarray
    density: np.ndarray
    targets: dict[str, np.ndarray]
    units: dict[str, str]
    space_groups: dict[float, np.ndarray]
    graphs: list[dict[str, Any]]
    damaged: int
    folds: int = 0
    """Number of folds; then `splits` says nothing."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made, from the manifest."""


def statistics(config: InspectConfig) -> Statistics:
    """Reads a data set once, in parallel.

    Raises:
        ValueError: not a data set, or damaged so that it cannot be opened.
    """
    dataset = Dataset.open(config.inspect)
    n = len(dataset)
    ranges = [range(start, min(start + _READ, n)) for start in range(0, n, _READ)]
    look = _Look(dataset, tuple(config.symprec))
    elements: Counter[int] = Counter()
    rows: list[tuple[float, ...]] = []
    bar = tqdm(total=n, desc="inspecting", unit=" crystals", disable=not config.progress)
    with bar, Workers(look, config.workers) as workers:
        for some, found in workers.map(ranges, chunk=1):
            rows += some
            elements.update(found)
            bar.update(len(some))
    kinds, dense, *groups = np.array(rows).T
    targets = dataset.manifest.targets
    return Statistics(
        splits=dataset.manifest.splits,
        elements=dict(sorted(elements.items())),
        kinds=kinds.astype(int),
        atoms=dataset.atoms,
        volume=dataset.volume / dataset.atoms,
        density=dense,
        targets={name: dataset.targets_of(name) for name in targets},
        units={name: t.unit for name, t in targets.items() if t.unit},
        space_groups={s: g.astype(int) for s, g in zip(config.symprec, groups, strict=True)},
        graphs=list(dataset.manifest.graphs.values()),
        damaged=int((kinds == 0).sum()),
        folds=dataset.folds,
        provenance=dataset.manifest.provenance,
    )


class _Look:
    """What is looked up in each crystal: (different elements, density, space groups …)."""

    def __init__(self, dataset: Dataset, symprec: tuple[float, ...]) -> None:
        self.dataset, self.symprec = dataset, symprec

    def __call__(self, items: range) -> tuple[list[tuple[float, ...]], Counter[int]]:
        rows: list[tuple[float, ...]] = []
        elements: Counter[int] = Counter()
        for _, crystal in self.dataset.read(items):
            if isinstance(crystal, Crystal):
                kinds = set(crystal.numbers.tolist())
                elements.update(kinds)
                groups = (space_group(crystal, s) for s in self.symprec)
                rows.append((len(kinds), density(crystal), *groups))
            else:
                rows.append((0, np.nan, *(0 for _ in self.symprec)))
        return rows, elements


def describe(found: Statistics) -> str:
    """Statistics as text."""
    n = len(found.atoms)
    splits = ", ".join(f"{found.splits[s]} {s}" for s in SPLITS)
    splits = f"{found.folds} folds" if found.folds else splits
    lines = [f"{n} crystals: {splits}", *_made(found.provenance)]
    if found.damaged:
        lines.append(f"{found.damaged} of them cannot be read: see verify=DIR")
    for spec in found.graphs:
        lines.append("graphs stored: " + ", ".join(f"{k} {v}" for k, v in asked(spec).items()))
    symbols = (f"{chemical_symbols[z]} {count}" for z, count in found.elements.items())
    lines += [f"{len(found.elements)} elements, crystals with each: {', '.join(symbols)}", ""]
    header = ("", "labelled", "mean", "std", "min", "5 %", "median", "95 %", "max")
    table: list[tuple[str, ...]] = [header]
    quantities = {
        "atoms per cell": found.atoms,
        "different elements": found.kinds,
        "volume (Å³/atom)": found.volume,
        "density (g/cm³)": found.density,
    }
    for name, values in found.targets.items():
        unit = found.units.get(name)
        quantities[f"{name} ({unit})" if unit else name] = values
    table += [_row(name, np.asarray(values, dtype=float)) for name, values in quantities.items()]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    for symprec, groups in found.space_groups.items():
        counts = Counter(groups[groups > 0].tolist())
        often = ", ".join(f"{group}: {count}" for group, count in counts.most_common(10))
        lines += ["", f"space groups at {symprec:g} Å: {len(counts)} different; most often {often}"]
    return "\n".join(lines)


def _made(provenance: Mapping[str, Any]) -> list[str]:
    """Which cells the crystals are in, how they were read and split, as far as it is known."""
    reduced = (provenance.get("cell") or {}).get("reduced")
    cells = f"cells: {cells_of(provenance)}"
    cells += f", {reduced} of them reduced" if reduced else ""
    if names := extensive_of(provenance):
        cells += f"; {', '.join(names)} went with the number of atoms"
    lines = [cells]
    if "checks" in provenance:
        dropped = sum(provenance.get("dropped", {}).values())
        warned = provenance.get("warned", 0)
        lines.append(
            f"read with checks={provenance['checks']}: {provenance['kept']} of "
            f"{provenance['records']} records kept, {dropped} dropped, {warned} with a warning"
        )
    if "rule" in (split := provenance.get("split") or {}):
        more = (f"{k}={v}" for k, v in split.items() if k in ("split_by", "seed", "stratified_by"))
        lines.append(" ".join([f"split: {split['rule']}", *more]))
    return lines


def _row(name: str, values: np.ndarray) -> tuple[str, ...]:
    known = values[np.isfinite(values)]
    if not len(known):
        return (name, "0", *[""] * 7)
    facts = [known.mean(), known.std(), *np.quantile(known, [0, 0.05, 0.5, 0.95, 1])]
    return (name, str(len(known)), *(f"{fact:.4g}" for fact in facts))


def columns(found: Statistics) -> tuple[dict[str, Any], dict[str, str]]:
    """What histograms are drawn of besides atoms and elements: values and units by name."""
    values: dict[str, Any] = {"volume": found.volume, **found.targets}
    for symprec, groups in found.space_groups.items():
        values[f"space group at {symprec:g} Å"] = groups
    return values, {"volume": "A^3/atom", **found.units}
