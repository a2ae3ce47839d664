"""The operations on edges and tokens: Triton kernels against torch and the memory's bandwidth.

    python benchmarks/kernels.py data=DIR                  a data set made by launch/prepare.py
    … batch_size=1024 width=256 dtype=bf16 repeats=20

Forward and backward of each operation on the graphs of a batch, PDDFormer's for all but the
Matformer messages. `GB` are the bytes of the least traffic: every input read once, every output
written once, and again for the gradients; `GFLOP` those of its matrix products. The limit is the
larger of the times these take at the speed of a large copy and of a large matrix product on the
same device in the same run, and `of_limit` its share of the measured time; where all fits in a
cache it means little. Where there is no GPU, torch's definitions alone are timed. The last line is
the table as JSON.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.tables import show
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models import kernels
from crysforge.models.encoders import build_encoder
from crysforge.models.kernels import self_test as trial
from crysforge.models.ops.edges import Edges
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run
from crysforge.trainer.engines.base import PRECISIONS


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory."""
    batch_size: int = 256
    """Crystals in the batch, spread evenly over the data set."""
    width: int = 256
    """Channels; half of it for each of 4 heads in the Matformer messages."""
    dtype: str = "auto"
    """fp32, bf16, fp16; auto is bf16 on GPUs, else fp32."""
    quotient: bool = True
    """Quotient or full graphs."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 10
    """Times each path is run, in alternation, after three to warm up."""


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call, on the device's own clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device).normal_()
    target = torch.empty_like(source)
    times = [seconds_of(lambda: target.copy_(source), device) for _ in range(8)][3:]
    return 2 * source.nbytes / statistics.median(times)


def arithmetic(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [seconds_of(lambda: a @ b, device) for _ in range(8)][3:]
    return 2 * n**3 / statistics.median(times)


def operations(name: str, edges: int, width: int, heads: int) -> float:
    """Of the matrix products, forward and twice as many backward."""
    if name == "comformer_messages":
        return 3 * 2 * 2 * edges * width**2
    if name == "matformer_messages":
        return 3 * 2 * 3 * edges * heads * width**2
    return 0.0


def graph_of(encoder: str, crystals: list[Crystal], quotient: bool) -> Edges:
    return Edges.of(build(crystals, build_encoder({"name": encoder}).graph, quotient=quotient))


def measure(
    case: trial.Case, edges: Edges, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict:
    """One row: seconds of both paths, bytes of the least traffic."""
    leaves = [x.to(device, dtype).requires_grad_() for x in case.inputs]
    leaves += [x.float().to(device).requires_grad_() for x in case.parameters]
    edges = trial.edges_on(edges, device)
    traffic = [0]

    def work() -> None:
        out = case.function(edges, *leaves)
        moved = [*leaves, *out]
        if out[0].requires_grad:
            grads = torch.autograd.grad(out[0], leaves, torch.ones_like(out[0]))
            moved += [*grads, *leaves, out[0]]
        traffic[0] = sum(t.nbytes for t in moved)

    paths = ["torch", "triton"] if device.type == "cuda" else ["torch"]
    taken: dict[str, list[float]] = {path: [] for path in paths}
    for repeat in range(repeats + 3):
        for path in paths:
            with kernels.using(path):
                seconds = seconds_of(work, device)
            if repeat >= 3:
                taken[path].append(seconds)
    return {
        "operation": case.name,
        "edges": len(edges),
        "GB": traffic[0] / 1e9,
        **{f"{path}_ms": 1e3 * statistics.median(taken[path]) for path in paths},
    }


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data")
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = config.dtype if config.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    if name not in PRECISIONS:
        raise ValueError(f"dtype must be auto, fp32, bf16 or fp16, got {name!r}")
    dtype = PRECISIONS[name] or torch.float32
    dataset = Dataset.open(config.data)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, config.batch_size).astype(int))
    crystals = [c for _, c in dataset.read(chosen) if isinstance(c, Crystal)]
    speed, rate = bandwidth(device), arithmetic(device, dtype)
    rows = []
    for encoder, width in (("pddformer", config.width), ("matformer", config.width // 2)):
        edges = graph_of(encoder, crystals, config.quotient)
        for case in trial.cases(edges, width, heads=4):
            if (case.name == "matformer_messages") == (encoder == "matformer"):
                row = measure(case, edges, device, dtype, config.repeats)
                row["GFLOP"] = operations(case.name, len(edges), width, 4) / 1e9
                row["limit_ms"] = 1e12 * max(row["GB"] / speed, row["GFLOP"] / rate)
                if "triton_ms" in row:
                    row["ratio"] = row["torch_ms"] / row["triton_ms"]
                best = row.get("triton_ms", row["torch_ms"])
                row["of_limit"] = row["limit_ms"] / best
                rows.append(row)
    about = {
        "device": str(device),
        "dtype": name,
        "copy_GB_per_s": speed / 1e9,
        "TFLOP_per_s": rate / 1e12,
    }
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
    show(rows, {**about, "threads": config.threads})


if __name__ == "__main__":
    run(main)
