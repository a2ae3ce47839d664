"""The update of the weights, with clipping and the guard: torch's plain AdamW against ours.

    python benchmarks/optimizer.py               the paper's model with DiT-B; takes 5 GB
    … config=configs/pretrain/small.yaml stage=vae threads=1 repeats=20

Clipping and then AdamW tensor by tensor (`plain`), the same with torch's default (`torch`), and
`GuardedAdamW`, in turn in one process, on equal gradients; the least time of the repeats counts.
The last line is the table as JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

import torch

from benchmarks.tables import show
from crysforge.models.encoders import build_encoder
from crysforge.trainer.base.command_line import from_sources, parse
from crysforge.trainer.base.script import run
from crysforge.trainer.engines.adamw import GuardedAdamW
from crysforge.trainer.jobs.schemas import pretrain_schema
from crysforge.trainer.loop.optim import param_groups
from crysforge.trainer.stages.base import STAGES, Stage

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    config: str = "configs/pretrain/crysldnet.yaml"
    """Of the model."""
    stage: str = "joint"
    """Whose weights are updated."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 10
    """Updates of each kind."""


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    torch.set_num_threads(config.threads)
    model = from_sources(pretrain_schema(), [config.config])
    stage = STAGES[config.stage](getattr(model, config.stage), build_encoder(model.encoder))
    weights = [p for p in stage.parameters() if p.requires_grad]
    gradients = [torch.randn_like(p) for p in weights]
    kinds = updates(stage, weights)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(1 + config.repeats):  # moments are made in the first
        for name, update in kinds.items():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            began, used = time.perf_counter(), time.process_time()
            update()
            took = time.perf_counter() - began, time.process_time() - used
            seconds[name].append(took)
    rows = [
        {
            "update": name,
            "wall_ms": 1e3 * min(wall for wall, _ in taken[1:]),
            "cpu_ms": 1e3 * min(cpu for _, cpu in taken[1:]),
        }
        for name, taken in seconds.items()
    ]
    for row in rows:
        row["cpu_ratio"] = rows[0]["cpu_ms"] / row["cpu_ms"]
    count = sum(p.numel() for p in weights)
    show(rows, {"parameters": count, "tensors": len(weights), "threads": config.threads})


def updates(stage: Stage, weights: list[torch.nn.Parameter]) -> dict[str, Callable[[], None]]:
    """What is compared, each with moments of its own."""

    def plain(**how: bool) -> Callable[[], None]:
        foreach = how.get("foreach")
        optimizer = torch.optim.AdamW(param_groups(stage, 0.01), lr=1e-9, **how)

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=foreach)
            optimizer.step()

        return update

    ours = GuardedAdamW(param_groups(stage, 0.01), 1.0, CPU)
    for group in ours.param_groups:
        group["lr"] = 1e-9
    return {"plain": plain(foreach=False, fused=False), "torch": plain(), "ours": ours.step}


if __name__ == "__main__":
    run(main)
