"""Speed of the loader from shards to packed batches, and its memory.

    python benchmarks/loader.py data=DIR                  a data set made by launch/prepare.py
    python benchmarks/loader.py data=[DIR,DIR] crystals=4000
    python benchmarks/loader.py data=DIR mean_atoms=21    cells as large as GNoME's
    python benchmarks/loader.py sizes=[10000,1000000]     memory only, synthetic crystals

Three tables. Speed: crystals per second of CPU time of one process, graphs and distance rows
included, where the graph is built from the stored structure, kept from the epoch before, or baked
into the shards (`launch/prepare.py bake=DIR`); the three run in alternation, the fastest pass of
each counts. Workers: crystals per second on the clock with one loader process and with two, in
alternation, which wants two idle cores; `by CPU time` is the same from the CPU time that training
process and workers use for a crystal, for a machine whose two cores are idle. Memory: largest
resident memory of a training process and its loader worker, each started afresh, on data sets of
`sizes` crystals; pages that both share count twice. The last line is everything as JSON.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import safetensors.numpy as safetensors
import torch

from benchmarks.processes import resident
from benchmarks.tables import markdown
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.loading.config import LoaderConfig
from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.preparing.bake import bake
from crysforge.datapipe.preparing.edit import subset
from crysforge.datapipe.preparing.edit_configs import BakeConfig, SubsetConfig
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    Shard,
    Target,
)
from crysforge.datapipe.storage.record import INDEX, encode
from crysforge.trainer.base.command_line import parse
from crysforge.trainer.base.script import run

SPECS = {
    "pddformer": GraphSpec(neighbors=25, pdd=92, depth=4),
    "matformer": GraphSpec(neighbors=12, lattice_edges="matformer", depth=5),
}


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: Any = field(default_factory=list)
    """Data set, or a list of them."""
    mean_atoms: float | None = None
    """Leave the smallest cells out, or the largest, until the mean number of atoms is this."""
    crystals: int = 4000
    """Crystals of the training split to measure with, drawn at random."""
    batch_size: int = 64
    """Crystals per batch."""
    shuffle: int = 2048
    """Shuffle window of the speed tables: smaller than the number of crystals, so that shards are
    streamed and not kept in memory."""
    lanes: int = 8
    """Lanes; with `shuffle` as long as those of a large data set under the default settings."""
    repeats: int = 3
    """Passes of each kind."""
    epochs: float = 1
    """Passes over the crystals in the measurement with workers; 0 leaves it out."""
    sizes: list[int] = field(default_factory=list)
    """Numbers of synthetic crystals of the memory table."""
    steps: int = 400
    """Batches that are taken before memory is looked at."""

    def __post_init__(self) -> None:
        self.data = [self.data] if isinstance(self.data, str) else list(self.data)


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    if not config.data and not config.sizes:
        raise ValueError("give data=DIR or sizes=[10000,1000000]")
    torch.set_num_threads(1)
    tables: dict[str, list[dict[str, Any]]] = {"speed": [], "workers": [], "memory": []}
    with tempfile.TemporaryDirectory(prefix="crysforge-") as folder:
        for number, root in enumerate(config.data):
            sets = stored_and_baked(root, f"{folder}/{number}", config)
            name = Path(root).name
            tables["speed"] += [{"data": name, **speed(*sets, spec, config)} for spec in SPECS]
            if config.epochs:
                rows = [{"data": name, **workers(sets[0], spec, config)} for spec in SPECS]
                tables["workers"] += rows
        for size in config.sizes:
            tables["memory"].append(memory(f"{folder}/synthetic-{size}", size, config))
    for row in tables["memory"]:
        row["growth MB"] = row["sum MB"] - tables["memory"][0]["sum MB"]
    for name, rows in tables.items():
        if rows:
            print(f"{name}\n\n{markdown(rows)}\n")
    print(json.dumps({"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), **tables}))


# Speed


def stored_and_baked(root: str, folder: str, config: BenchmarkConfig) -> tuple[str, str]:
    """A random part of the data set, and the same with baked graphs."""
    dataset = Dataset.open(root)
    atoms = np.sort(dataset.atoms[dataset.split_items("train")])
    filters = Filters()
    if config.mean_atoms is not None:
        small = atoms.mean() > config.mean_atoms  # which cells stay
        order = atoms if small else atoms[::-1]
        means = np.cumsum(order) / np.arange(1, len(order) + 1)
        fit = np.flatnonzero((means <= config.mean_atoms) if small else means >= config.mean_atoms)
        if not len(fit):
            raise ValueError(f"the cells of {root} have no mean of {config.mean_atoms} atoms")
        last = float(order[fit[-1]])
        filters = Filters(atoms=[None, last] if small else [last, None])
        atoms = order[: fit[-1] + 1]
    part = SubsetConfig(subset=root, output=f"{folder}/stored", splits=["train"], progress=False)
    part.filters, part.count = filters, min(config.crystals, len(atoms))
    subset(part)
    baked = BakeConfig(bake=part.output, output=f"{folder}/baked", progress=False)
    bake(baked, SPECS.values())
    return part.output, baked.output


def stream(root: str, spec: GraphSpec, config: BenchmarkConfig, **values: Any) -> Stream:
    """Training batches without end."""
    loader = LoaderConfig(
        **{"workers": 0, "shuffle": config.shuffle, "lanes": config.lanes} | values
    )
    return Stream(Dataset.open(root), "train", spec, loader, batch_size=config.batch_size)


def take(batches: Iterator, steps: int, clock=time.process_time) -> tuple[float, int]:
    """Seconds that so many batches take, and their crystals."""
    start = clock()
    crystals = sum(batch.num_crystals for batch in islice(batches, steps))
    return clock() - start, crystals


def speed(stored: str, baked: str, name: str, config: BenchmarkConfig) -> dict[str, Any]:
    """CPU time of one process."""
    spec = SPECS[name]
    rates = {"stored": 0.0, "kept": 0.0, "baked": 0.0}
    steps = len(Dataset.open(stored)) // config.batch_size
    for _ in range(config.repeats):
        first = iter(stream(stored, spec, config, cache_mb=4096))
        again = iter(stream(baked, spec, config, cache_mb=0))
        for kind, batches in (("stored", first), ("kept", first), ("baked", again)):
            seconds, count = take(batches, steps)
            rates[kind] = max(rates[kind], count / seconds)
    atoms = Dataset.open(stored).atoms
    return {
        "crystals": len(atoms),
        "atoms": round(float(atoms.mean()), 1),
        "graph": name,
        **{f"{kind}/s": round(rate) for kind, rate in rates.items()},
        "baked : stored": round(rates["baked"] / rates["stored"], 2),
    }


def workers(root: str, name: str, config: BenchmarkConfig) -> dict[str, Any]:
    """One worker and two, in turns."""
    rates, cost = {1: 0.0, 2: 0.0}, {1: float("inf"), 2: float("inf")}
    for _ in range(config.repeats):
        for count in rates:
            source = stream(root, SPECS[name], config, workers=count, cache_mb=0)
            batches = iter(source)
            take(batches, 2 * count * source.config.prefetch)  # they start and fill the queue
            before = cpu_seconds()
            steps = int(config.epochs * source.epoch_size / config.batch_size)
            seconds, crystals = take(batches, steps, time.perf_counter)
            used = [now - then for now, then in zip(cpu_seconds(), before, strict=True)]
            rates[count] = max(rates[count], crystals / seconds)
            # One core each, or two cores for all.
            busy = max(used) if count == 1 else sum(used) / 2
            cost[count] = min(cost[count], busy / crystals)
            del batches
            source.close()
    return {
        "graph": name,
        "1 worker/s": round(rates[1]),
        "2 workers/s": round(rates[2]),
        "ratio": round(rates[2] / rates[1], 2),
        "ratio by CPU time": round(cost[1] / cost[2], 2),
    }


def cpu_seconds() -> list[float]:
    """CPU time so far of this process and of its workers."""
    processes = sorted(str(p.pid) for p in multiprocessing.active_children())
    ticks = os.sysconf("SC_CLK_TCK")
    out = [time.process_time()]
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].split()
        out.append((int(fields[11]) + int(fields[12])) / ticks)
    return out


# Memory


def memory(root: str, size: int, config: BenchmarkConfig) -> dict[str, Any]:
    """Peak memory of a training process and its worker."""
    write_synthetic(root, size)
    fresh = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with fresh:
        bare, process, worker = fresh.submit(peaks, root, config).result()
    disk = sum(path.stat().st_size for path in Path(root).iterdir())
    return {
        "crystals": size,
        "on disk MB": round(disk / 1e6),
        "process before MB": round(bare),
        "process MB": round(process),
        "worker MB": round(worker),
        "sum MB": round(process + worker),
    }


def write_synthetic(root: str, size: int, shard_size: int = 10_000) -> None:
    """A data set of crystals that differ in id alone, written tens of times faster than
    `DatasetWriter` would."""
    crystal = Crystal("x" * 9, np.array([11, 17]), np.array([[0.0] * 3, [0.5] * 3]), 4 * np.eye(3))
    record = encode(crystal, [])
    before, after = record.split(b"x" * 9)
    info = tarfile.TarInfo()
    info.size = len(record)
    block = -(-len(record) // 512) * 512
    shards, crc32 = [], np.empty(size, dtype=np.uint32)
    Path(root).mkdir(parents=True)
    for start in range(0, size, shard_size):
        end, name = min(start + shard_size, size), f"train-{start // shard_size:06d}.tar"
        parts = []
        for i in range(start, end):
            info.name, data = f"{i:09d}.safetensors", before + b"%09d" % i + after
            crc32[i] = zlib.crc32(data)
            parts += [info.tobuf(tarfile.USTAR_FORMAT), data.ljust(block, b"\0")]
        tar = b"".join(parts) + b"\0" * 1024
        (Path(root) / name).write_bytes(tar)
        digest = hashlib.sha256(tar).hexdigest()
        shards.append(Shard(name, "train", end - start, len(tar), digest))
    index: dict[str, np.ndarray] = {
        "atoms": np.full(size, 2, dtype=np.int32),
        "volume": np.full(size, crystal.volume, dtype=np.float32),
        "offset": np.arange(size, dtype=np.int64) % shard_size * (512 + block),
        "crc32": crc32,
        "targets": np.empty((size, 0)),
    }
    data = safetensors.save(index)
    (Path(root) / INDEX).write_bytes(data)
    targets: dict[str, Target] = {}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        created_by="benchmark",
        splits={"train": size, "val": 0, "test": 0},
        shards=shards,
        index_sha256=hashlib.sha256(data).hexdigest(),
        elements=[11, 17],
        targets=targets,
        provenance={},
    )
    (Path(root) / MANIFEST).write_text(json.dumps(asdict(manifest)))


def peaks(root: str, config: BenchmarkConfig) -> tuple[float, float, float]:
    """MB of a process before it opens the data set, then its peak and that of its worker."""
    torch.set_num_threads(1)
    bare = high_water("self")
    source = Stream(
        Dataset.open(root),
        "train",
        SPECS["pddformer"],
        LoaderConfig(workers=1),
        batch_size=config.batch_size,
    )
    for _ in islice(source, config.steps):
        pass
    (worker,) = multiprocessing.active_children()
    return bare, high_water("self"), high_water(str(worker.pid))


def high_water(process: str) -> float:
    """Largest resident memory of a process so far, in MB."""
    return resident("VmHWM", process) / 2**20


if __name__ == "__main__":
    run(main)
