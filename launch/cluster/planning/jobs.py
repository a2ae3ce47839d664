"""What can be submitted: the launch scripts, and checked configs for them."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
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
    settings: str
    """Dataclass of its settings, or what makes it: module and name. It is imported when it is asked
    for: PyTorch takes seconds, and the status of jobs needs none of it."""
    output: str
    """Setting that says where it writes."""
    required: tuple[str, ...]
    distributed: bool = False
    """Whether it runs on several processes."""

    def schema(self) -> type:
        """Dataclass of its settings."""
        module, name = self.settings.split(":")
        found = getattr(importlib.import_module(f"crysforge.{module}"), name)
        schema: type = found if isinstance(found, type) else found()
        return schema


JOBS = {
    "pretrain": Job(
        "launch/pretrain.py",
        "trainer.jobs.schemas:pretrain_schema",
        "run_dir",
        ("data", "stages"),
        distributed=True,
    ),
    "finetune": Job(
        "launch/finetune.py", "trainer.jobs.schemas:FinetuneJob", "run_dir", ("data", "targets")
    ),
    "prepare": Job("launch/prepare.py", "datapipe.preparing.config:PrepareConfig", "output", ()),
    "predict": Job(
        "launch/predict.py",
        "trainer.serving.config:PredictConfig",
        "output",
        ("checkpoint", "input"),
    ),
}


@dataclass(frozen=True)
class PlannedRun:
    """One run of a submission."""

    name: str
    output: str
    values: dict[str, Any]
    """What sets it apart from the others."""
    config: dict[str, Any]
    """Settings of its job."""
    job: str
    after: tuple[str, ...] = ()
    """Runs that must have finished before."""


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
    if hasattr(config, "check"):
        config.check()


def waves(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """The runs, those before that others wait for; the runs of a wave have the same job."""
    left, found = list(runs), []
    while left:
        names = {c.name for c in left}
        ready = [c for c in left if not names & set(c.after)]
        assert ready, "runs wait for each other"
        found += [[c for c in ready if c.job == job] for job in dict.fromkeys(c.job for c in ready)]
        left = [c for c in left if c not in ready]
    return found


def groups(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """The waves, each taken apart into runs that wait for the same."""
    return [
        [c for c in wave if c.after == after]
        for wave in waves(runs)
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
