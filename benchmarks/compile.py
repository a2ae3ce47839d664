"""Whether torch.compile pays for stage 2's denoiser: steps as they are against compiled ones.

    python benchmarks/compile.py data=DIR                  a data set made by launch/prepare.py
    … size=mini batch_size=32 batches=6 repeats=3 precision=bf16

Forward and backward on `batches` batches whose shapes differ, as they do in training, in
alternation on the same weights. The compiled denoiser has dynamic shapes and has seen every batch
once; `first_pass_s` is what that took, `graphs` how many it made, which is more than one where
shapes are read. On a GPU the definitions in torch are compiled and compared with the Triton
kernels. The encoders and their messages are not tried: their backward passes are written by hand,
which torch.compile cannot follow. The last line is the table as JSON.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.tables import show
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models import kernels
from crysforge.models.denoisers.dit import SIZES, DiT
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run
from crysforge.trainer.engines.base import PRECISIONS, set_recompute

Batch = tuple[Tensor, Tensor, Tensor, Tensor, list[int]]
"""Latents, times, crystal of each token, first token of each crystal, and sizes."""


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory."""
    size: str = "B"
    """Size of the DiT."""
    layers: int = 0
    """Blocks, instead of those of the size."""
    dim: int = 256
    """Width of the latents."""
    precision: str = "fp32"
    """fp32 or bf16."""
    batch_size: int = 64
    """Crystals."""
    batches: int = 3
    """Batches, drawn at random."""
    repeats: int = 3
    """Passes over the batches."""
    threads: int = 2
    """CPU threads."""


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data")
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    size = SIZES[config.size]
    model = DiT(replace(size, layers=config.layers or size.layers), config.dim).to(device).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    set_recompute(model, "auto", device)
    batches = draw(config, device)
    plain = "torch" if device.type == "cpu" else "auto"
    compiled: Any = torch.compile(model, dynamic=True)
    paths = {"as it is": (model, plain), "compiled": (compiled, "torch")}
    taken: dict[str, list[float]] = defaultdict(list)
    first: dict[str, float] = defaultdict(float)
    turns = itertools.product(range(config.repeats + 1), paths, batches)
    for turn, path, batch in turns:
        function, choice = paths[path]
        with kernels.using(choice):
            seconds = step(function, model, batch, config.precision)
        if turn:
            taken[path].append(seconds)
        else:
            first[path] += seconds
    base = statistics.median(taken["as it is"])
    rows = [
        {
            "path": path,
            "step_ms": 1e3 * statistics.median(taken[path]),
            "speed": base / statistics.median(taken[path]),
            "first_pass_s": first[path],
            "graphs": counters["stats"]["unique_graphs"] if path == "compiled" else None,
        }
        for path in paths
    ]
    about = {"size": config.size, "layers": len(model.blocks), "precision": config.precision}
    show(rows, {**about, "device": str(device), "crystals": config.batch_size})


def draw(config: BenchmarkConfig, device: torch.device) -> list[Batch]:
    """Batches with the atom numbers of crystals drawn at random."""
    rng, atoms = np.random.default_rng(0), np.asarray(Dataset.open(config.data).atoms)
    out = []
    for sizes in rng.choice(atoms, (config.batches, config.batch_size), replace=False).tolist():
        each = torch.tensor(sizes, device=device)
        ptr = torch.nn.functional.pad(each.cumsum(0), (1, 0))
        batch = torch.repeat_interleave(each, output_size=sum(sizes))
        x = torch.randn(sum(sizes), config.dim, device=device)
        out.append((x, torch.rand(len(sizes), device=device), batch, ptr, sizes))
    return out


def step(function: Callable[..., Tensor], model: DiT, batch: Batch, precision: str) -> float:
    """Seconds of forward and backward."""
    model.zero_grad(set_to_none=True)
    kind, device = PRECISIONS[precision], batch[0].device
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    with torch.autocast(device.type, kind, enabled=kind is not None):
        out = function(*batch)
    out.float().square().mean().backward()
    wait()
    return time.perf_counter() - began


if __name__ == "__main__":
    run(main)
