"""What pretraining cost: speed, memory, parameters and steps of each stage, from its log."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.trainer.evaluation.suite import Suite, SuiteRun, shown
from crysforge.trainer.reports.formats import NOTHING, Entry, Number, Table
from crysforge.trainer.runs.forms import RUN
from crysforge.trainer.runs.logger import read_metrics
from crysforge.trainer.runs.model_directory import Exported, open_model
from crysforge.trainer.stages.base import STAGES, Stage, count_parameters


def costs_table(suite: Suite, published: Sequence[dict[str, Any]] = ()) -> Table | None:
    """One row for each stage of each pretraining run, then the published costs; None without a
    pretraining run."""
    runs = [c for c in suite.runs if c.job == "pretrain"]
    if not runs:
        return None
    names = [f for f in suite.factors if any(f in c.values for c in runs)]
    body: list[list[Entry]] = []
    for run in runs:
        head: list[Entry] = [run.name, *(shown(run.values.get(f)) for f in names)]
        body += [[*head, *row] for row in _stages(run)]
    for cost in published:
        size = Number(1000 * cost["peak_gb"], 0)
        name = f"{cost['pretraining']}: {cost['source']}"
        minutes = Number(cost["minutes"], 0)
        body.append([name, *[""] * len(names), cost["stage"], *[NOTHING] * 4, size, minutes])
    columns = [
        "run", *names, "stage", "parameters", "of the encoder", "steps", "crystals/s",
        "peak memory / MB", "minutes",
    ]  # fmt: skip
    notes = [
        "Crystals per second: median over the log; a stage that looks at several views of a "
        "crystal counts it once. Memory: most on the first GPU, or of the process on a CPU."
    ]
    title = f"{suite.title}: cost of pretraining"
    return Table("costs", title, columns, body, 2 + len(names), notes)


def _stages(run: SuiteRun) -> list[list[Entry]]:
    """Rows of a run, one for each stage; a stage that did not finish says so."""
    try:
        record = read_mapping(run.path / "run.json", RUN)
        stages, finished = record["identity"]["stages"], record["finished"]
    except (ValueError, KeyError):
        return [["not started", *[NOTHING] * 6]]
    return [_stage(run.path, name, name in finished) for name in stages]


def _stage(run: Path, name: str, finished: bool) -> list[Entry]:
    parameters: list[Entry] = [NOTHING, NOTHING]
    views = 1
    if finished:
        stage = built(open_model(run, name))
        parameters = [count_parameters(stage), count_parameters(stage.encoder)]
        views = getattr(stage.transform(), "views", 1)
    try:
        curves = read_metrics(run, name)
    except OSError:
        curves = {}
    speeds = [v / views for _, v in curves.get("speed/crystals_per_s", [])]
    paces = curves.get("speed/steps_per_s", [])
    steps, seconds = 0, 0.0
    for step, pace in paces:
        seconds += (step - steps) / pace if pace else 0.0
        steps = step
    memory = [v for _, v in curves.get("memory/peak_gb", [])]
    return [
        name if finished else f"{name} (not finished)",
        *parameters,
        steps or NOTHING,
        Number(statistics.median(speeds), 0 if min(speeds) >= 100 else 1) if speeds else NOTHING,
        Number(1000 * max(memory), 0) if memory else NOTHING,
        Number(seconds / 60, 1) if seconds else NOTHING,
    ]


def built(exported: Exported) -> Stage:
    """The stage anew, without its weights; torch's generator stays where it was."""
    with torch.random.fork_rng():
        kind = STAGES[exported.stage]
        return kind(configure(kind.Config, exported.settings), exported.build_encoder())
