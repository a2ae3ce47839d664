"""What a stage is: a module that turns a packed batch into named sums and counts.

The loop is one and knows no stage. It asks for the terms of a batch, divides each sum by the
count over all ranks, adds up those that `weights` names, and steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.graphs.transforms import Transform
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.base import Encoder
from crysforge.models.generative.guidance import Guidance
from crysforge.models.generative.sampler import Field, SamplingConfig
from crysforge.models.registry import Registry
from crysforge.trainer.base.tensors import load_into
from crysforge.trainer.stages.made import SampleRequest, Wanted, Watch


@dataclass
class Term:
    """A quantity to be averaged over the global batch: both are scalar fp32 tensors."""

    total: Tensor
    """Sum over this rank's part (with gradient where it enters the loss)."""
    count: Tensor
    """What to divide by, summed over ranks first."""


@dataclass(kw_only=True)
class StageConfig:
    """Settings every stage has: how long and how fast it learns."""

    epochs: float = 50
    """Passes over the training split."""
    max_steps: int | None = None
    """Ends the stage (and its learning-rate cycle) after so many steps, whatever `epochs` says."""
    batch_size: int = 256
    """Crystals per optimiser step, over all ranks."""
    lr: float = 1e-3
    """Largest learning rate of the one-cycle schedule."""
    weight_decay: float = 1e-5
    """AdamW decay; biases and norm parameters have none."""
    pct_start: float = 0.3
    """Fraction of the steps in which the learning rate rises."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_steps", 1), ("weight_decay", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("epochs", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.lr <= 10:
            raise ValueError(f"lr must be above 0 and at most 10, got {self.lr}")
        if self.weight_decay > 100:
            raise ValueError(f"weight_decay must be at most 100, got {self.weight_decay}")
        if self.epochs > 1e9:
            raise ValueError(f"epochs must be at most 1e9, got {self.epochs}")
        if not 0 <= self.pct_start <= 1:
            raise ValueError(f"pct_start must be in [0, 1], got {self.pct_start}")


KEPT, METRICS = ("last", "best"), ("loss", "robust")


@dataclass(kw_only=True)
class PretrainingConfig(StageConfig):
    """Settings of a stage that learns without labels, and hands its encoder on."""

    keep_weights: str = "last"
    """Which weights are handed on: the `last`, or the `best` by validation (the released codes)."""
    best_metric: str = "loss"
    """What the best are best by: the validation `loss`, or `robust`, which latents that shrink do
    not lower. They differ where latents are predicted (stage `joint`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("keep_weights", KEPT), ("best_metric", METRICS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"unknown {name} {value!r}: {nearest(value, known)}")


class Saved(Protocol):
    """A stage as it was saved (`Exported` in runs/model_directory.py): what rebuilds it, and what
    the next stage may take from it."""

    stage: str
    """Its name."""
    settings: dict[str, Any]
    """Its config as a mapping."""
    scaler: Any
    """Targets, units, mean and std of the labels, if it learned from labels."""

    @property
    def file(self) -> Path:
        """Where its weights are, for messages."""

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Tensors of its state dict whose names start with `prefix`, without it."""

    def new_encoder(self) -> Encoder:
        """An encoder of its kind, with fresh weights."""


class Stage(nn.Module):
    """Base of all stages: an encoder with an objective.

    A subclass sets `Config` (a dataclass derived from `StageConfig`), `name`, `encoder`, `config`
    and `weights`, and implements `forward`. It is built as `cls(config, encoder)`; one that needs
    more than that implements `from_exported` too. See docs/objectives.md.
    """

    Config: ClassVar[type[StageConfig]]
    name: ClassVar[str]
    learns_from_labels: ClassVar[bool] = False
    """Whether it is a finetuning: built from labels and their statistics by launch/finetune.py."""
    min_atoms: ClassVar[int] = 1
    """Smaller crystals are left out of this stage's stream."""
    robust: ClassVar[str] = "loss"
    """Validation average, or what is `derived` of some, that latents that shrink do not lower."""

    encoder: Encoder
    """The part that every next stage starts from, and that is finetuned."""
    config: Any
    weights: Mapping[str, float]
    """Terms that enter the loss, with their weights."""
    fields: Mapping[str, Field]
    """What `draw` samples, if the stage makes crystals so."""

    def transform(self) -> Transform | None:
        """What the loader does to a crystal before and after its graph is built."""
        return None

    @abstractmethod
    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        """Loss terms and metrics of a batch.

        The names are the same in every batch of a mode (training, evaluation); totals and counts
        are fp32 scalars on the batch's device, and nothing waits for the device. Draws come from
        `batch.rng_key` (ops/keyed_random.py), so that a resumed run draws the same. A dummy batch
        (`batch.is_dummy`: this rank has no crystal in the step) goes through the same code, so that
        all ranks take part in every collective; the loop sets its totals and counts to zero. A
        stage that gathers crystals of other ranks itself must leave out those of dummy batches.
        """

    @property
    def monitor(self) -> str | None:
        """Validation average whose least value's weights are kept; None keeps the last ones."""
        if getattr(self.config, "keep_weights", "last") == "last":
            return None
        return self.robust if self.config.best_metric == "robust" else "loss"

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """What follows from averaged terms, by name; shown beside them in validation."""
        return {}

    def warnings(self, means: Mapping[str, float]) -> list[str]:
        """Sentences for the log if these averaged metrics are a sign of trouble."""
        return []

    def take(self, before: Saved) -> None:
        """Takes from the stage before what goes beyond its encoder: `before.weights("heads.")`, for
        instance. Called once, on a fresh start. By default nothing is taken."""

    @classmethod
    def from_exported(cls, saved: Saved) -> Stage:
        """The stage that was saved, with its weights.

        Raises:
            ValueError: settings or weights that are not those of this stage.
        """
        stage = cls(configure(cls.Config, saved.settings, "settings"), saved.new_encoder())
        load_into(stage, saved.weights(), str(saved.file))
        return stage

    def look(self, crystals: Iterable[Crystal]) -> None:
        """Notes in buffers what it needs to know of the training crystals before it learns from
        them. Called once on every rank, with the same crystals, if it is overridden."""

    @property
    def generative(self) -> bool:
        """Whether it makes crystals."""
        return type(self).sample is not Stage.sample or type(self).draw is not Stage.draw

    def sample(self, request: SampleRequest, generator: torch.Generator) -> list[Crystal]:
        """New crystals, without gradients; those that came to nothing are left out.

        Raises:
            ValueError: the stage makes none, or none of the kind that is asked for.
        """
        from pymatgen.core import Composition

        if type(self).draw is Stage.draw:
            self.draw([])
        numbers: list[int] = []
        for element, count in Composition(request.formula or {}).items():
            numbers += [element.Z] * round(count * request.formula_units)
        keys = torch.randint(2**62, (request.count,), generator=generator)
        sizes = [0] * request.count if numbers else self.sizes(keys)
        wanted = [
            Wanted(
                name=str(i),
                key=int(key),
                numbers=tuple(sorted(numbers)),
                atoms=request.atoms or size,
            )
            for i, (key, size) in enumerate(zip(keys, sizes, strict=True))
        ]
        return [c for c in self.draw(wanted) if isinstance(c, Crystal)]

    def draw(
        self,
        wanted: Sequence[Wanted],
        sampling: SamplingConfig | None = None,
        guidance: Guidance | None = None,
        watch: Watch | None = None,
    ) -> list[Crystal | BadCrystal]:
        """The crystals that are wanted, in order; for one that came to nothing, why.

        Args:
            sampling: instead of the settings that the stage has.
            watch: is called after every step.

        Raises:
            ValueError: the stage makes none, or none of the kind that is asked for.
        """
        raise ValueError(f"stage {self.name!r} does not generate crystals")

    def own_sampling(self) -> SamplingConfig:
        """How samples are drawn unless somebody says otherwise."""
        settings: SamplingConfig = self.config.sampling
        return settings

    def sizes(self, keys: Tensor) -> list[int]:
        """Atoms in a cell for each key, distributed as those that the stage learned from.

        Raises:
            ValueError: it does not choose elements.
        """
        raise ValueError(f"stage {self.name!r} needs a formula: it does not choose elements")


_OURS = ("crysdiff", "crysgnn", "crystal_twins", "crysxpp", "dpf", "finetune", "joint", "vae")
_GENERATIVE = ("ab_initio", "crysldm", "crysldm_vae", "csp")
STAGES: Registry[type[Stage]] = Registry(
    "stage",
    modules={
        **{name: f"crysforge.trainer.stages.{name}" for name in _OURS},
        **{name: f"crysforge.trainer.stages.generative.{name}" for name in _GENERATIVE},
    },
    plugins="crysforge.stages",
)


def pretraining_stages() -> dict[str, type[Stage]]:
    """The stages that pretrain, by name. A plug-in that does not load is left out here, and an
    error where it is asked for."""
    found = {}
    for name in STAGES:
        with suppress(ValueError):
            if not STAGES[name].learns_from_labels:
                found[name] = STAGES[name]
    return found


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(p.numel() for p in module.parameters())
