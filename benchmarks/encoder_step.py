"""Training step of the encoders: the plain definition against ours, on full and quotient graphs.

    python benchmarks/encoder_step.py data=DIR             a data set made by launch/prepare.py
    … encoders=[pddformer] batch_size=64 threads=2 repeats=5

Paper-size encoders, fp32, forward and backward of one batch in training mode. The plain
definition is that of the tests (tests/reference_*.py): concatenations over edges, full graphs, no
quotient. The three run in alternation; times are medians of wall time. An encoder that has no
quotient has no such row. The last line is the table as JSON.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tables import show
from crysforge.datapipe.common.config import configure
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.schema import CrystalBatch
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.encoders import ENCODERS, Encoder, build_encoder
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run
from tests import reference_angles, reference_backbones
from tests.reference_encoders import reference

PLAIN = {**reference_backbones.PLAIN, **reference_angles.PLAIN}
Run = Callable[[CrystalBatch], Tensor]


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory."""
    encoders: list[str] = field(default_factory=lambda: ["pddformer", "matformer"])
    """Which to measure."""
    batch_size: int = 64
    """Crystals in the batch, spread evenly over the data set."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 5
    """Steps of each kind after one to warm up."""


def step(model: nn.Module, run: Run, batch: CrystalBatch) -> float:
    """Seconds of one forward and backward of what uses the model's parameters."""
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    run(batch).square().mean().backward()
    return time.perf_counter() - began


def definition(encoder: Encoder) -> tuple[nn.Module, Run]:
    """The plain definition of an encoder, and the module whose parameters it uses."""
    name = encoder.section["name"]
    if name in PLAIN:
        return encoder, partial(PLAIN[name], encoder)
    settings = {k: v for k, v in encoder.section.items() if k != "name"}
    plain = reference(encoder, name, configure(ENCODERS[name].Config, settings)).train()
    return plain, plain


def measure(name: str, crystals: list[Crystal], repeats: int) -> list[dict]:
    """Rows for one encoder: plain, full and, where it has one, quotient."""
    torch.manual_seed(0)
    encoder = build_encoder({"name": name}).train()
    full = build(crystals, encoder.graph, quotient=False)
    kinds: dict[str, tuple[nn.Module, Run, CrystalBatch]] = {
        "plain": (*definition(encoder), full),
        "full": (encoder, encoder, full),
    }
    if encoder.graph.depth is not None:
        kinds["quotient"] = encoder, encoder, build(crystals, encoder.graph)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat, kind in itertools.product(range(repeats + 1), kinds):
        taken = step(*kinds[kind])
        if repeat:
            seconds[kind].append(taken)
    base = statistics.median(seconds["plain"])
    rows = []
    for kind, (*_, batch) in kinds.items():
        median = statistics.median(seconds[kind])
        rows.append(
            {
                "encoder": name,
                "path": kind,
                "nodes": batch.num_nodes,
                "edges": batch.num_edges,
                "ms": 1000 * median,
                "spread_ms": 1000 * (max(seconds[kind]) - min(seconds[kind])),
                "crystals_per_s": len(crystals) / median,
                "ratio": base / median,
            }
        )
    return rows


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data")
    torch.set_num_threads(config.threads)
    dataset = Dataset.open(config.data)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, config.batch_size).astype(int))
    crystals = [c for _, c in dataset.read(chosen) if isinstance(c, Crystal)]
    rows = [row for name in config.encoders for row in measure(name, crystals, config.repeats)]
    show(rows, {"threads": config.threads, "crystals": len(crystals)})


if __name__ == "__main__":
    run(main)
