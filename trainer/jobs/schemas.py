"""The config schemas of the jobs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from crysforge.datapipe.common.safe_names import check_names
from crysforge.datapipe.loading.config import LoaderConfig
from crysforge.models.encoders import build_encoder
from crysforge.trainer.loop.config import TrainerConfig
from crysforge.trainer.runs.saved import TAG
from crysforge.trainer.stages.base import STAGES, pretraining_stages
from crysforge.trainer.stages.finetune import FinetuneConfig


@dataclass(kw_only=True)
class GraphConfig:
    """How graphs are built, beyond what the encoder declares."""

    quotient: bool = True
    """Whether encoders that allow it run on quotient graphs: equal output, fewer edges."""
    ties: str = ""
    """Neighbours as far away as the k-th: `kept`, or `cut` by rounding as in the released codes,
    which switches the quotient off. Empty: as the encoder that the job starts from has it, and kept
    by a fresh one."""

    def __post_init__(self) -> None:
        if self.ties not in ("", "kept", "cut"):
            raise ValueError(f"graph.ties must be kept or cut, got {self.ties!r}")


@dataclass(kw_only=True)
class JobConfig:
    """Settings every training job has."""

    data: str = ""
    """Directory or URL of a prepared data set."""
    fold: int | None = None
    """Fold to test on, of a data set that was prepared with folds."""
    run_dir: str = ""
    """Where the run lives. A run that is there is continued."""
    init_from: str = ""
    """Run whose encoder weights to start from; empty or `none` starts from scratch."""
    init_stage: str = ""
    """Stage of `init_from` to take the encoder from; default its last one."""
    encoder: dict[str, Any] = field(default_factory=dict)
    """`name` of a registered encoder and its settings; `tiny: true` for its debug flavour."""
    seed: int = 0
    """Seed of initial weights, order and all draws."""
    resume: str = "auto"
    """`auto` continues the run in run_dir if there is one; `must` insists; `never` refuses; a
    checkpoint's name (`vae-00001000`) goes back to it, once, and sets aside what came later."""
    graph: GraphConfig = field(default_factory=GraphConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    dry_run: bool = False
    """Show what would be run, and stop."""

    def __post_init__(self) -> None:
        if self.resume not in ("auto", "must", "never") and not TAG.match(self.resume):
            raise ValueError(
                f"resume must be auto, must, never or a checkpoint's name such as vae-00001000, "
                f"got {self.resume!r}"
            )
        if self.init_from == "none":
            self.init_from = ""

    def check(self) -> None:
        """Raises ValueError for an encoder that cannot be built."""
        if "name" in self.encoder or not self.init_from:
            build_encoder(self.encoder)


@dataclass(kw_only=True)
class PretrainJob(JobConfig):
    """One or more pretraining stages in sequence."""

    stages: list[str] = field(default_factory=lambda: ["vae", "joint"])
    """Stages to run, in order; each has a section of its own name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.stages:
            if self.stages.count(name) > 1:
                raise ValueError(f"stages={list(self.stages)} names {name} more than once")
            if STAGES[name].learns_from_labels:
                raise ValueError(f"stages=[{name}]: start it with launch/{name}.py")
            if getattr(self, name).epochs == 0:
                raise ValueError(f"{name}.epochs must be above 0: leave the stage out of stages")


@dataclass(kw_only=True)
class FinetuneJob(JobConfig):
    """Supervised training of an encoder with a readout head, on one device."""

    target: str = ""
    """Name of the label to predict."""
    targets: list[str] = field(default_factory=list)
    """Several labels at once; missing ones are skipped crystal by crystal."""
    label_fraction: float = 1.0
    """Share of the labelled training crystals to use, drawn with the seed."""
    label_count: int | None = None
    """Number of labelled training crystals to use, instead of a fraction."""
    atoms: list[int] | None = None
    """Least and most atoms in a cell: learns from such crystals, and is judged on such, alone."""
    init_head: bool = False
    """Starts from the readout of `init_from` too, and from its labels' mean and spread: it was
    finetuned on the same property elsewhere. With `finetune.epochs=0` it is only evaluated."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.label_fraction <= 1:
            raise ValueError(f"label_fraction must be in (0, 1], got {self.label_fraction}")
        if self.label_count is not None and self.label_count < 1:
            raise ValueError(f"label_count must be at least 1, got {self.label_count}")
        if self.atoms is not None and not (
            len(self.atoms) == 2 and 1 <= self.atoms[0] <= self.atoms[1]
        ):
            raise ValueError(f"atoms must be [least, most], got {self.atoms}")
        if self.target and self.targets:
            raise ValueError("give target=NAME or targets=[…], not both")
        if self.init_head and not self.init_from:
            raise ValueError("init_head=true needs init_from=RUN, the finetuning to start from")
        if self.finetune.epochs == 0 and not self.init_head:
            raise ValueError("finetune.epochs=0 evaluates a finetuned model: give init_head=true")
        if self.target:
            self.targets = [self.target]
        check_names(self.targets)


def pretrain_schema() -> type[PretrainJob]:
    """`PretrainJob` with a section for every registered stage."""
    stages = pretraining_stages().items()
    sections = [(name, stage.Config, field(default_factory=stage.Config)) for name, stage in stages]
    return dataclasses.make_dataclass("PretrainJob", sections, bases=(PretrainJob,), kw_only=True)
