"""Weak scaling from 1 to 2 processes on CPUs, and a communication model for many GPUs.

    python benchmarks/scaling.py data=DIR                  a data set made by launch/prepare.py
    … zero_stages=[0,1,2,3] batch_size=32 steps=5

The measured part trains the small joint stage under DeepSpeed, with the same number of crystals
per process, and counts the bytes that collectives are handed per step: one process (`ms_1`), two
at the same time that know nothing of each other (`ms_apart`, the slower one's: what the machine's
memory and cores allow) and two in a group (`ms_2`). `efficiency` is ms_1 / ms_2, `communication`
the part that the group costs, ms_apart / ms_2.

The model predicts a step of CrysLDNet's second stage (PDDFormer and DiT-B) on N GPUs:

    compute · imbalance + max(0, gradients − overlap · backward) + weights + small · latency

with bytes per rank and step 4P·(N−1)/N for every pass over the parameters (ZeRO 0 to 2: gradients
and weights once each; ZeRO 3: gradients once, weights twice), the slowest link on the way, `small`
collectives of batch statistics (two per batch norm) and of the loss, and the imbalance of packed
batches drawn from the data set's atom counts. All assumptions are settings; the time of a step on
one GPU is one of them. The last line is both tables as JSON.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.tables import markdown
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.denoisers.dit import SIZES
from crysforge.models.encoders import build_encoder
from crysforge.models.ops.norm import BatchNorm
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.distributed import World
from crysforge.trainer.base.script import run
from crysforge.trainer.engines.base import EngineConfig
from crysforge.trainer.engines.build import build_engine
from crysforge.trainer.loop.averages import total_over_ranks, weighted_loss
from crysforge.trainer.loop.optim import param_groups
from crysforge.trainer.stages.base import STAGES
from tests.distributed.ranks import free_port

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce",
    "broadcast",
)


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark, and the assumptions of the model."""

    data: str = ""
    """Data set directory."""
    zero_stages: list[int] = field(default_factory=lambda: [1])
    """ZeRO stages to measure; none: the model alone."""
    batch_size: int = 32
    """Crystals per process and step in the measured part."""
    steps: int = 5
    """Steps measured, after two to warm up."""
    gpus: list[int] = field(default_factory=lambda: [1, 8, 64, 512])
    """Numbers of GPUs to predict."""
    per_gpu: int = 256
    """Crystals per GPU and step."""
    crystals_per_s: float = 8000.0
    """Of one GPU alone: the target of stage 2 on an H200, not yet measured."""
    node_gpus: int = 8
    """GPUs of a node."""
    node_gb_s: float = 350.0
    """Bandwidth of a GPU's link within the node, in one direction, that collectives reach (the
    datasheet of NVLink 4 says 450)."""
    net_gb_s: float = 40.0
    """The same of its share of the network between nodes (400 Gb/s: 50)."""
    node_us: float = 15.0
    """Latency of a small collective within a node."""
    net_us: float = 15.0
    """Added latency for every doubling of the nodes."""
    overlap: float = 0.7
    """Share of the backward pass that can hide the reduction of gradients."""


def joint_stage(dit: str = "mini", width: int = 128):
    """The stage of the measured part: PDDFormer of some width with a small DiT."""
    torch.manual_seed(0)
    encoder = build_encoder({"name": "pddformer", "width": width, "layers": 3})
    return STAGES["joint"](STAGES["joint"].Config(dit=SIZES[dit]), encoder)


def apart(part: int, ports: list[int], zero: int, config: BenchmarkConfig, out: str) -> None:
    """Trains alone on one part of the crystals, beside others."""
    worker(0, 1, ports[part], zero, config, f"{out}{part}", part)


def worker(
    rank: int,
    size: int,
    port: int,
    zero: int,
    config: BenchmarkConfig,
    out: str,
    part: int | None = None,
) -> None:
    """Trains as one of `size` processes; rank 0 writes seconds and bytes per step."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size)
    )
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    world = World(rank, size, rank)
    stage = joint_stage()
    dataset = Dataset.open(config.data)
    chosen = np.linspace(0, len(dataset) - 1, 2 * config.batch_size).astype(int)
    chosen = chosen[rank if part is None else part :: 2]
    crystals = [c for _, c in dataset.read(np.unique(chosen)) if isinstance(c, Crystal)]
    batch = build([c for c in crystals if len(c) > 1], stage.encoder.graph)
    settings = EngineConfig(engine="deepspeed", zero_stage=zero)
    engine = build_engine(stage, param_groups(stage, 0.0), 1.0, settings, world)
    engine.stage.train()
    sent = count_bytes()
    seconds, sizes = [], []
    for _ in range(config.steps + 2):
        dist.barrier()
        sent[0] = 0
        began = time.perf_counter()
        terms = engine.forward(batch)
        sums = total_over_ranks(terms, (), world)
        engine.backward(weighted_loss(terms, sums, engine.stage.weights, world)[0])
        engine.step(1e-4, 0.9)
        seconds.append(time.perf_counter() - began)
        sizes.append(sent[0])
    if rank == 0:
        report = {"seconds": statistics.median(seconds[2:]), "bytes": sizes[-1]}
        report["parameters"] = sum(p.numel() for p in joint_stage().parameters())
        Path(out).write_text(json.dumps(report))
    dist.destroy_process_group()


def count_bytes() -> list[int]:
    """A counter of the bytes that every collective from now on is handed."""
    total = [0]

    def counted(function):
        def call(*args, **kwargs):
            values = [*args, *kwargs.values()]
            tensors = [v for v in values if isinstance(v, torch.Tensor)]
            total[0] += max((t.nbytes for t in tensors), default=0)
            return function(*args, **kwargs)

        return call

    for name in filter(partial(hasattr, dist), COLLECTIVES):
        setattr(dist, name, counted(getattr(dist, name)))
    return total


def measured(config: BenchmarkConfig) -> list[dict]:
    rows = []
    for zero in config.zero_stages:
        found = {}
        for size in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                out = f"{folder}/report.json"
                args = (size, free_port(), zero, config, out)
                torch.multiprocessing.spawn(worker, args, nprocs=size)
                found[size] = json.loads(Path(out).read_text())
        with tempfile.TemporaryDirectory() as folder:
            args = ([free_port() for _ in range(2)], zero, config, f"{folder}/report")
            torch.multiprocessing.spawn(apart, args, nprocs=2)
            alone = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
        slower = max(report["seconds"] for report in alone)
        rows.append(
            {
                "zero_stage": zero,
                "ms_1": 1e3 * found[1]["seconds"],
                "ms_apart": 1e3 * slower,
                "ms_2": 1e3 * found[2]["seconds"],
                "efficiency": found[1]["seconds"] / found[2]["seconds"],
                "communication": slower / found[2]["seconds"],
                "MB_per_step": found[2]["bytes"] / 1e6,
                "in_parameters": found[2]["bytes"] / 4 / found[2]["parameters"],
            }
        )
    return rows


def imbalance(atoms: np.ndarray, per_gpu: int, gpus: int) -> float:
    """Mean over steps of the largest rank's atoms over the average rank's, for ranks that draw
    their crystals at random."""
    rng = np.random.default_rng(0)
    steps = max(1, 512 // gpus)
    drawn = rng.choice(atoms, (steps, gpus, per_gpu)).sum(axis=2)
    return float((drawn.max(axis=1) / drawn.mean(axis=1)).mean())


def predict(config: BenchmarkConfig, atoms: np.ndarray) -> list[dict]:
    with torch.device("meta"):
        stage = joint_stage("B", 256)
    parameters = sum(p.numel() for p in stage.parameters())
    small = 2 * sum(isinstance(m, BatchNorm) for m in stage.modules()) + 1
    compute = config.per_gpu / config.crystals_per_s
    rows = []
    for n in config.gpus:
        nodes = math.ceil(n / config.node_gpus)
        speed = 1e9 * (config.node_gb_s if nodes == 1 else config.net_gb_s)
        latency = config.node_us * (n > 1) + config.net_us * math.log2(max(nodes, 1))
        once = 4 * parameters * (n - 1) / n
        uneven = imbalance(atoms, config.per_gpu, n)
        for zero in (1, 3):
            gradients, weights = once / speed, (2 if zero == 3 else 1) * once / speed
            hidden = config.overlap * 2 / 3 * compute
            step = compute * uneven + max(0.0, gradients - hidden) + weights
            step += small * latency * 1e-6
            rows.append(
                {
                    "gpus": n,
                    "zero_stage": zero,
                    "MB_per_step": (3 if zero == 3 else 2) * once / 1e6,
                    "imbalance": uneven,
                    "exposed_ms": 1e3 * (step - compute * uneven),
                    "step_ms": 1e3 * step,
                    "crystals_per_s": n * config.per_gpu / step,
                    "efficiency": compute / step,
                }
            )
    return rows


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data")
    atoms = Dataset.open(config.data).atoms
    tables = {"measured": measured(config), "predicted": predict(config, np.asarray(atoms))}
    for rows in tables.values():
        print(f"{markdown(rows)}\n")
    print(json.dumps({**tables, "settings": asdict(config)}))


if __name__ == "__main__":
    run(main)
