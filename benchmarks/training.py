"""Training as users run it, with its loader: crystals/s, the share of the time that steps wait for
data, and peak memory, of each stage.

    python benchmarks/training.py data=DIR                 a data set made by launch/prepare.py
    … baked=DIR workers=[1,2]                              the same baked; more loader processes
    … config=configs/pretrain/small.yaml stages=[dpf,crysxpp] batch_size=64 steps=100

Each row is made of runs of launch/pretrain.py, in alternation with those of the other rows; the
median over the log counts, without each run's first 20 steps. A stage that looks at several views
of a crystal counts it once. The last line is the table as JSON.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import show
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run
from crysforge.trainer.reports.costs import built
from crysforge.trainer.runs.logger import read_metrics
from crysforge.trainer.runs.model_directory import open_model
from crysforge.trainer.stages.base import count_parameters

ROOT = Path(__file__).resolve().parents[1]
EVERY, SKIPPED = 10, 2
"""Steps between two lines of the log, and lines that do not count."""


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory."""
    baked: str = ""
    """The same with baked graphs; empty: none."""
    config: str = "configs/pretrain/crysldnet.yaml"
    """Of the model and its training."""
    stages: list[str] = field(default_factory=lambda: ["vae", "joint"])
    """Stages, each in runs of its own."""
    settings: list[str] = field(default_factory=list)
    """More settings of launch/pretrain.py, as `encoder.width=64`."""
    workers: list[int] = field(default_factory=lambda: [1])
    """Numbers of loader processes."""
    batch_size: int = 64
    """Crystals."""
    steps: int = 100
    """Of a run."""
    repeats: int = 1
    """Runs of each row."""

    def __post_init__(self) -> None:
        if self.steps < EVERY * (SKIPPED + 1):
            raise ValueError(f"steps={self.steps}: {EVERY * (SKIPPED + 1)} or more are needed")


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data")
    sets = {"stored": config.data} | ({"baked": config.baked} if config.baked else {})
    kinds = list(itertools.product(config.stages, sets, config.workers))
    found: dict[Any, dict[str, list[float]]] = {kind: defaultdict(list) for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="crysforge-") as folder:
        for repeat, (number, kind) in itertools.product(range(config.repeats), enumerate(kinds)):
            path = Path(folder) / f"{number}-{repeat}"
            train(config, kind[0], sets[kind[1]], kind[2], path)
            note(path, kind[0], found[kind])
    rows = []
    for (stage, data, workers), values in found.items():
        median = {name: statistics.median(numbers) for name, numbers in values.items()}
        rows.append(
            {
                "stage": stage,
                "data": data,
                "workers": workers,
                "parameters": int(median["parameters"]),
                "crystals_per_s": median["speed"],
                "data_wait": median["wait"],
                "peak_MB": 1e3 * max(values["memory"]),
            }
        )
    show(rows, {"config": config.config, "batch_size": config.batch_size, "steps": config.steps})


def train(config: BenchmarkConfig, stage: str, data: str, workers: int, path: Path) -> None:
    """A run of one stage. Raises ValueError if it fails."""
    settings = [
        *config.settings, f"data={data}", f"run_dir={path}", f"stages=[{stage}]",
        f"{stage}.batch_size={config.batch_size}", f"{stage}.max_steps={config.steps}",
        f"loader.workers={workers}", f"trainer.log_every={EVERY}", "trainer.validate_every=0",
    ]  # fmt: skip
    command = [sys.executable, "launch/pretrain.py", "--config", config.config, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def note(path: Path, stage: str, values: dict[str, list[float]]) -> None:
    """Adds what a run's log says."""
    model = built(open_model(path, stage))
    views = getattr(model.transform(), "views", 1)
    values["parameters"] = [count_parameters(model)]
    curves = read_metrics(path, stage)
    for name, key, scale in (
        ("speed", "speed/crystals_per_s", 1 / views),
        ("wait", "speed/data_wait", 1.0),
        ("memory", "memory/peak_gb", 1.0),
    ):
        values[name] += [scale * v for _, v in curves[key][SKIPPED:]]


if __name__ == "__main__":
    run(main)
