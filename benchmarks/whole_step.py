"""Whole training steps of both stages at paper size, as the engine takes them: crystals/s.

    python benchmarks/whole_step.py data=DIR               a data set made by launch/prepare.py
    … precision=bf16 batch_size=256 recompute=blocks steps=30

Forward, loss, backward, clipping and AdamW on one batch that is copied to the device every step,
without the loader. On a GPU the Triton kernels and torch's definitions alternate, each over `steps`
steps between two synchronisations. The last line is the table as JSON.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.memory import BenchmarkConfig as BatchConfig
from benchmarks.memory import make
from benchmarks.tables import show
from crysforge.models import kernels
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.distributed import World
from crysforge.trainer.base.script import run
from crysforge.trainer.engines.base import EngineConfig
from crysforge.trainer.engines.build import build_engine
from crysforge.trainer.loop.averages import (
    nan_unless_finite,
    peak_bytes,
    total_over_ranks,
    weighted_loss,
)
from crysforge.trainer.loop.optim import param_groups


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory."""
    stages: list[str] = field(default_factory=lambda: ["vae", "joint"])
    """Stages, with DiT-B."""
    encoder: str = "pddformer"
    """Registered encoder."""
    precision: str = "bf16"
    """fp32, bf16 or fp16."""
    recompute: str = "auto"
    """Recomputation in the denoiser: auto, none, cheap or blocks."""
    batch_size: int = 256
    """Crystals."""
    atoms: int = 21
    """Atoms of a crystal, as nearly as the data set has them."""
    steps: int = 20
    """Steps of each path in one turn; two turns count, one warms up."""
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
        batch_config = BatchConfig(
            data=config.data,
            encoder=config.encoder,
            batch_size=config.batch_size,
            atoms=config.atoms,
        )
        stage, batch = make(name, batch_config)
        batch = batch.pin_memory() if on_gpu else batch
        settings = EngineConfig(
            engine="torch", precision=config.precision, recompute=config.recompute
        )
        engine = build_engine(stage, param_groups(stage, 0.01), 1.0, settings, world)
        engine.stage.train()

        def step(engine=engine, batch=batch) -> None:
            terms = engine.forward(batch.to(world.device, non_blocking=True))
            sums = total_over_ranks(terms, (), world)
            share, loss = weighted_loss(terms, sums, engine.stage.weights, world)
            engine.backward(nan_unless_finite(share, loss))
            engine.step(1e-4, 0.9)

        paths = ["torch", "triton"] if on_gpu else ["torch"]
        seconds, peaks = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0)
        for turn in range(3):
            for path in paths:
                with kernels.using(path):
                    if on_gpu:
                        torch.cuda.synchronize()
                        torch.cuda.reset_peak_memory_stats()
                    began = time.perf_counter()
                    for _ in range(config.steps):
                        step()
                    if on_gpu:
                        torch.cuda.synchronize()
                peaks[path] = peak_bytes(world.device)
                if turn:
                    seconds[path] += time.perf_counter() - began
        for path, taken in seconds.items():
            each = taken / (2 * config.steps)
            rows.append(
                {
                    "stage": name,
                    "kernels": path,
                    "atoms": batch.num_atoms,
                    "edges": batch.num_edges,
                    "step_ms": 1e3 * each,
                    "crystals_per_s": batch.num_crystals / each,
                    "peak_MB": peaks[path] / 1e6,
                }
            )
    about = {"device": str(world.device), "precision": config.precision}
    if on_gpu:
        about["device"] = torch.cuda.get_device_name(world.device)
    show(rows, {**about, "recompute": config.recompute})


if __name__ == "__main__":
    run(main)
