"""Peak memory of a training step: the memory model against what a process takes.

    python benchmarks/memory.py data=DIR                   a data set made by launch/prepare.py
    … stages=[vae,joint] precisions=[fp32] batch_size=256 atoms=21 threads=2

One batch of the crystals whose number of atoms is nearest to `atoms`, of which stage 1 masks some;
paper-size models on quotient graphs. A child process builds the engine and takes two steps.
`measured_MB` is the peak of forward and backward in the second, when Adam's moments are there:
allocated on a GPU; on a CPU resident, above what the process had before it had the weights, with
an allocator that gives memory back at once. `update_MB` is the peak of the update: on CPUs AdamW is
not fused and takes more. Without `measure` the model alone speaks.
`published` is the released code's peak on a GPU at this batch size. The model counts a step in the
form it has on a GPU without the Triton kernels; on a CPU the messages' buffers are smaller. The
last line is the table as JSON.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.processes import resident
from benchmarks.tables import show
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import Sample
from crysforge.datapipe.schema import CrystalBatch
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.encoders import build_encoder
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.distributed import World
from crysforge.trainer.base.script import run
from crysforge.trainer.engines.base import EngineConfig
from crysforge.trainer.engines.build import build_engine
from crysforge.trainer.loop.averages import total_over_ranks, weighted_loss
from crysforge.trainer.loop.memory import plan_memory
from crysforge.trainer.loop.optim import param_groups
from crysforge.trainer.stages.base import STAGES, Stage

PUBLISHED_MB = {"vae": 5986, "joint": 8482}


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory."""
    stages: list[str] = field(default_factory=lambda: ["vae", "joint"])
    """Stages, with DiT-B."""
    encoder: str = "pddformer"
    """Registered encoder."""
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    """Precisions."""
    recompute: list[str] = field(default_factory=lambda: ["none", "cheap", "blocks"])
    """Recomputation in the denoiser; counts in the joint stage alone."""
    measure: bool = True
    """Whether the steps are run; bf16 takes long on CPUs without instructions for it."""
    measure_bf16: bool = False
    """Whether those in bf16 are run on CPUs too."""
    quotient: bool = True
    """Quotient or full graphs."""
    batch_size: int = 256
    """Crystals."""
    atoms: int = 21
    """Atoms of a crystal."""
    threads: int = 2
    """CPU threads."""


def make(name: str, config: BenchmarkConfig) -> tuple[Stage, CrystalBatch]:
    """A stage and a batch for it."""
    torch.manual_seed(0)
    stage = STAGES[name](STAGES[name].Config(), build_encoder({"name": config.encoder}))
    dataset = Dataset.open(config.data)
    nearest = np.argsort(np.abs(np.asarray(dataset.atoms) - config.atoms), kind="stable")
    chosen = np.sort(nearest[: config.batch_size])
    samples = [Sample.clean(c, key) for key, c in dataset.read(chosen) if isinstance(c, Crystal)]
    graph, transform = stage.encoder.graph, stage.transform()
    return stage, build(samples, graph, quotient=config.quotient, transform=transform)


def forget(world: World) -> None:
    """From here on the peak is another one."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def child(name: str, config: BenchmarkConfig, settings: EngineConfig, queue) -> None:
    """Takes two steps and reports the peaks of the second: before the update, and in it."""
    torch.set_num_threads(config.threads)
    stage, batch = make(name, config)
    before = resident("VmRSS") - sum(p.nbytes for p in stage.parameters())
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def peak() -> int:
        if world.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resident("VmHWM") - before

    engine = build_engine(stage, param_groups(stage, 0.01), 1.0, settings, world)
    engine.stage.train()
    for _ in range(2):  # moments are there from the first update on
        forget(world)
        terms = engine.forward(batch.to(world.device))
        sums = total_over_ranks(terms, (), world)
        engine.backward(weighted_loss(terms, sums, stage.weights, world)[0])
        gradients = peak()
        forget(world)
        engine.step(1e-4, 0.9)
    queue.put((gradients, peak()))


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data")
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    spawn = multiprocessing.get_context("spawn")
    on_gpu = torch.cuda.is_available()
    rows = []
    for name in config.stages:
        stage, batch = make(name, config)
        for precision in config.precisions:
            for recompute in config.recompute if name == "joint" else ["none"]:
                settings = EngineConfig(engine="torch", precision=precision, recompute=recompute)
                plan = plan_memory(stage, batch, settings, 1, False)
                row = {
                    "stage": name,
                    "precision": precision,
                    "recompute": recompute,
                    "atoms": batch.num_atoms,
                    "edges": batch.num_edges,
                    "model_MB": plan.total / 1e6,
                    "measured_MB": None,
                    "update_MB": None,
                    "published_MB": PUBLISHED_MB.get(name),
                }
                if config.measure and (precision == "fp32" or on_gpu or config.measure_bf16):
                    queue = spawn.Queue()
                    process = spawn.Process(target=child, args=(name, config, settings, queue))
                    process.start()
                    row["measured_MB"], row["update_MB"] = (x / 1e6 for x in queue.get())
                    process.join()
                best = row["measured_MB"] or row["model_MB"]
                row["share"] = best / row["published_MB"] if row["published_MB"] else None
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    show(rows, {"threads": config.threads, "crystals": batch.num_crystals})


if __name__ == "__main__":
    run(main)
