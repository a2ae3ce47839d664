"""What can be submitted: the launch scripts, and checked configs for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.common.names import nearest
from crysforge.launch.cluster.config import SubmitConfig
from crysforge.trainer.base.command_line import required


@dataclass(frozen=True)
class Job:
    """A launch script that can be submitted."""

    script: str
    schema: Callable[[], type]
    """Dataclass of its settings; importing it takes a moment."""
    output: str
    """Setting that says where it writes."""
    required: tuple[str, ...]
    distributed: bool = False
    """Whether it runs on several processes."""


def _pretrain() -> type:
    from crysforge.trainer.jobs.schemas import pretrain_schema

    return pretrain_schema()


def _finetune() -> type:
    from crysforge.trainer.jobs.schemas import FinetuneJob

    return FinetuneJob


def _prepare() -> type:
    from crysforge.datapipe.preparing.config import PrepareConfig

    return PrepareConfig


def _predict() -> type:
    from crysforge.trainer.serving.config import PredictConfig

    return PredictConfig


JOBS = {
    "pretrain": Job("launch/pretrain.py", _pretrain, "run_dir", ("data", "stages"), True),
    "finetune": Job("launch/finetune.py", _finetune, "run_dir", ("data", "targets")),
    "prepare": Job("launch/prepare.py", _prepare, "output", ()),
    "predict": Job("launch/predict.py", _predict, "output", ("checkpoint", "input")),
}


@dataclass(frozen=True)
class Cell:
    """One run of a submission."""

    name: str
    output: str
    values: dict[str, Any]
    """What sets it apart from the others."""
    config: dict[str, Any]
    """Settings of its job."""
    job: str
    after: tuple[str, ...] = ()
    """Cells that must have finished before."""


def check_names(schema: type, values: Mapping[str, Any], others: Collection[str] = ()) -> None:
    """Raises ValueError for a first-level key that the schema does not have, nor is one of the
    others."""
    valid = {f.name for f in fields(schema)}
    for key in values:
        head = key.split(".")[0]
        if head not in valid:
            raise ValueError(f"unknown setting {head!r}: {nearest(head, valid | set(others))}")


def check(job: Job, values: Mapping[str, Any]) -> None:
    """Builds a job's config as the job will, and throws it away.

    Raises:
        ValueError: what the job would say of it.
    """
    config: Any = configure(job.schema(), values)
    required(config, *job.required)
    if hasattr(config, "encoder") and ("name" in config.encoder or not config.init_from):
        from crysforge.models.encoders import build_encoder

        build_encoder(config.encoder)
    if hasattr(config, "stages"):
        from crysforge.trainer.stages.base import STAGES

        for stage in config.stages:
            STAGES[stage]


def waves(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells, those before that others wait for; the cells of a wave have the same job."""
    left, found = list(cells), []
    while left:
        names = {c.name for c in left}
        ready = [c for c in left if not names & set(c.after)]
        assert ready, "cells wait for each other"
        found += [[c for c in ready if c.job == job] for job in dict.fromkeys(c.job for c in ready)]
        left = [c for c in left if c not in ready]
    return found


def groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The waves, each taken apart into cells that wait for the same."""
    return [
        [c for c in wave if c.after == after]
        for wave in waves(cells)
        for after in dict.fromkeys(c.after for c in wave)
    ]


def settings_of(config: SubmitConfig, job: str, waits_for: Sequence[str] = ()) -> SubmitConfig:
    """What a job asks of the cluster: one process if it takes no more, and a start after others."""
    if not JOBS[job].distributed and config.processes > 1:
        config = replace(config, nodes=1, gpus=min(config.gpus, 1), tasks_per_node=None)
    if waits_for:
        given = config.slurm.get("dependency")
        after = ",".join([*([given] if given else []), f"afterok:{':'.join(waits_for)}"])
        more = {"dependency": after, "kill-on-invalid-dep": "yes"}
        config = replace(config, slurm={**config.slurm, **more})
    return config
