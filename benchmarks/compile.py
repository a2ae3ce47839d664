"""Whether torch.compile pays: steps of a stage as they are against compiled ones.

    python benchmarks/compile.py data=DIR                  a data set made by launch/prepare.py
    … stages=[vae] size=mini batch_size=32 batches=6 repeats=3 precision=bf16

Forward and backward on `batches` batches whose shapes differ, as they do in training, in
alternation on the same weights; the compiled stage gets dynamic shapes and has seen every batch
once. `first_pass_s` is what that took, `graphs` how many graphs it is cut into, `breaks` why that
is more than one a stage, counted. On a GPU the definitions in torch are compiled and compared with
the Triton kernels. The last line is the table as JSON.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch._dynamo.utils import counters

from benchmarks.tables import show
from datapipe.crystal import Crystal
from datapipe.graph import build
from datapipe.schema import CrystalBatch
from datapipe.shards import Dataset
from datapipe.transforms import Sample
from models import kernels
from models.dit import SIZES
from models.encoders import build_encoder
from trainer import stages  # noqa: F401 - registers them
from trainer.config import parse, required, run
from trainer.distributed import World
from trainer.engine import PRECISIONS, set_recompute
from trainer.meter import total_over_ranks, weighted_loss
from trainer.stage import STAGES, Stage


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory."""
    stages: list[str] = field(default_factory=lambda: ["vae", "joint"])
    """Stages."""
    size: str = "B"
    """Size of the DiT."""
    encoder: str = "pddformer"
    """Registered encoder."""
    precision: str = "fp32"
    """fp32 or bf16."""
    batch_size: int = 64
    """Crystals."""
    batches: int = 4
    """Batches, drawn at random."""
    repeats: int = 3
    """Passes over the batches."""
    threads: int = 2
    """CPU threads."""


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data")
    torch.set_num_threads(config.threads)
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = world.device.type == "cuda"
    rows = []
    for name in config.stages:
        torch.manual_seed(0)
        settings = {"dit": SIZES[config.size]} if name == "joint" else {}
        encoder = build_encoder({"name": config.encoder})
        stage = STAGES[name](STAGES[name].Config(**settings), encoder).to(world.device).train()
        set_recompute(stage, "auto", world.device)
        batches = [b.to(world.device) for b in draw(stage, config)]
        torch._dynamo.reset()
        counters.clear()
        paths = {
            "as it is": (stage, "auto"),
            "compiled": (torch.compile(stage, dynamic=True), "torch"),
        }
        taken: dict[str, list[float]] = defaultdict(list)
        first: dict[str, float] = defaultdict(float)
        for turn, (path, batch) in itertools.product(
            range(config.repeats + 1), itertools.product(paths, batches)
        ):
            module, choice = paths[path]
            with kernels.using(choice if on_gpu else "torch"):
                seconds = step(module, stage, batch, config.precision, world)
            if turn:
                taken[path].append(seconds)
            else:
                first[path] += seconds
        base = statistics.median(taken["as it is"])
        for path in paths:
            median, compiled = statistics.median(taken[path]), path == "compiled"
            rows.append(
                {
                    "stage": name,
                    "path": path,
                    "step_ms": 1e3 * median,
                    "speed": base / median,
                    "first_pass_s": first[path],
                    "graphs": counters["stats"]["unique_graphs"] if compiled else None,
                    "breaks": sum(counters["graph_break"].values()) if compiled else None,
                }
            )
    show(rows, {"device": str(world.device), "precision": config.precision, "size": config.size})


def draw(stage: Stage, config: BenchmarkConfig) -> list[CrystalBatch]:
    """Batches of crystals drawn at random."""
    dataset, rng = Dataset.open(config.data), np.random.default_rng(0)
    chosen = rng.choice(len(dataset), (config.batches, config.batch_size), replace=False)
    transform = stage.transform()
    out = []
    for items in chosen:
        crystals = [(k, c) for k, c in dataset.read(np.sort(items)) if isinstance(c, Crystal)]
        samples = [Sample.clean(c, key) for key, c in crystals]
        if transform is not None:
            samples = [transform(s, np.random.default_rng(s.key)) for s in samples]
        out.append(build(samples, stage.encoder.graph))
    return out


def step(
    module: torch.nn.Module, stage: Stage, batch: CrystalBatch, precision: str, world: World
) -> float:
    """Seconds of forward and backward."""
    stage.zero_grad(set_to_none=True)
    kind = PRECISIONS[precision]
    wait = torch.cuda.synchronize if world.device.type == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    with torch.autocast(world.device.type, kind, enabled=kind is not None):
        terms = module(batch)
    weighted_loss(terms, total_over_ranks(terms, (), world), stage.weights, world)[0].backward()
    wait()
    return time.perf_counter() - began


if __name__ == "__main__":
    run(main)
