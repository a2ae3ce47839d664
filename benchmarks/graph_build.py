"""Speed of graph building on one core, and how much smaller quotient graphs are.

    python benchmarks/graph_build.py data=DIR              a data set made by launch/prepare.py
    … crystals=5000 batch_size=256 repeats=5

`neighbours` is what a loader does once per crystal and keeps; `pack` is what it does with kept
geometry for every batch; `both` is a loader without a cache. `masked` is the share of atoms whose
element is hidden, as in stage 1. Times are CPU time of one thread, the best of the repeats. The
ratios compare nodes with atoms, and quotient edges with those of the plain graph. The last line of
the output is the table as JSON.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.tables import show
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.graphs.packing import neighbours, pack
from crysforge.datapipe.graphs.transforms import MaskAtoms, Sample
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run

T = TypeVar("T")

SPECS = {
    "pddformer": GraphSpec(neighbors=25, pdd=92, depth=4),
    "matformer": GraphSpec(neighbors=12, lattice_edges="matformer", depth=5),
}


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory."""
    crystals: int = 2000
    """Crystals to measure, spread evenly over the data set."""
    batch_size: int = 64
    """Crystals per packed batch."""
    masked: float = 0.3
    """Share of masked atoms in the rows with masks."""
    repeats: int = 3
    """Runs of each measurement; the fastest counts."""


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data", "crystals", "batch_size", "repeats")
    torch.set_num_threads(1)
    crystals = read(config)
    rows = [row for name in SPECS for row in measure(name, crystals, config)]
    atoms = np.array([len(c) for c in crystals])
    print(f"{len(crystals)} crystals of {config.data}, {atoms.mean():.1f} atoms on average\n")
    show(rows, {"data": config.data, "crystals": len(crystals)})


def read(config: BenchmarkConfig) -> list[Crystal]:
    """Crystals spread evenly over the data set."""
    dataset = Dataset.open(config.data)
    items = np.unique(np.linspace(0, len(dataset) - 1, config.crystals).astype(np.int64))
    found = [crystal for _, crystal in dataset.read(items)]
    crystals = [c for c in found if not isinstance(c, BadCrystal)]
    if not crystals:
        raise ValueError(f"{config.data} has no readable crystal")
    return crystals


def measure(name: str, crystals: list[Crystal], config: BenchmarkConfig) -> list[dict[str, Any]]:
    """One row without masks and one with."""
    spec = SPECS[name]
    t_neighbours, geometry = fastest(lambda: [neighbours(c, spec) for c in crystals], config)
    rows = []
    for share in (0.0, config.masked):
        samples = [Sample.clean(c, key) for key, c in enumerate(crystals)]
        if share:
            mask = MaskAtoms(share)
            samples = [mask.on_crystal(s, np.random.default_rng(s.rng_key)) for s in samples]
        cuts = [*range(0, len(samples), config.batch_size), len(samples)]

        def pack_all(samples=samples, cuts=cuts):
            sizes = np.zeros(2, dtype=np.int64)
            for a, b in itertools.pairwise(cuts):
                batch = pack(samples[a:b], geometry[a:b], spec)
                sizes += batch.num_nodes, batch.num_edges
            return sizes

        t_pack, (nodes, edges) = fastest(pack_all, config)
        rows.append(
            {
                "spec": name,
                "masked": share,
                "neighbours/s": round(len(crystals) / t_neighbours),
                "pack/s": round(len(crystals) / t_pack),
                "both/s": round(len(crystals) / (t_neighbours + t_pack)),
                "node ratio": round(sum(map(len, crystals)) / nodes, 2),
                "edge ratio": round(sum(g.num_edges for g in geometry) / edges, 2),
                "kept bytes/crystal": round(sum(g.nbytes for g in geometry) / len(crystals)),
            }
        )
    return rows


def fastest(work: Callable[[], T], config: BenchmarkConfig) -> tuple[float, T]:
    """CPU seconds of the fastest run, and its result."""
    best, result = float("inf"), None
    for _ in range(config.repeats):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    assert result is not None
    return best, result


if __name__ == "__main__":
    run(main)
