"""What runs cost before they are started: passes over crystals, and device-hours at a rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.jobs.labels import labelled_items
from crysforge.trainer.jobs.schemas import FinetuneJob, pretrain_schema
from crysforge.trainer.stages.base import StageConfig

ATOMS = 9.2
"""Atoms a cell of the crystals that the rates were measured on (MP-20)."""
_STEPS = {
    "alignn": 10.8,
    "cgcnn": 3766.0,
    "dimenet++": 63.6,
    "ecomformer": 74.1,
    "equiformer": 11.4,
    "icomformer": 22.5,
    "matformer": 137.0,
    "megnet": 3142.0,
    "pddformer": 208.0,
    "potnet": 234.0,
    "schnet": 1412.0,
}
"""Crystals/s of each encoder at paper size, forward and backward, on two CPU cores (docs/speed.md,
`python benchmarks/encoder_step.py`)."""
_PASSES = {"vae": 1, "dpf": 1, "crysxpp": 1, "crysgnn": 1, "finetune": 1, "crystal_twins": 2}
"""Stages that take little beside so many passes of the encoder a crystal."""
_WHOLE = {("pddformer", "joint"): 28.6}
"""Crystals/s of whole steps on two CPU cores (docs/speed.md, `python benchmarks/training.py`)."""


@dataclass(frozen=True)
class Cost:
    """What one stage of a run takes."""

    stage: str
    passes: float | None
    """Crystals times epochs; None: the data set is not here."""
    atoms: float
    """Mean atoms of a cell."""
    rate: float | None
    """Crystals/s of one device at `atoms`; None: neither measured nor given."""

    @property
    def hours(self) -> float | None:
        """Device-hours of training steps; validation comes on top."""
        return self.passes / self.rate / 3600 if self.passes is not None and self.rate else None


class Bill:
    """What many runs cost; data sets are opened once.

    Args:
        runs: name → job (pretrain or finetune) and config, before any schema.
        hardware: name of the preset whose measured rates count.
        rates: crystals/s by stage, in the place of those; for crystals as they are.
    """

    def __init__(
        self,
        runs: Mapping[str, tuple[str, Mapping[str, Any]]],
        hardware: str = "",
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.hardware, self._rates = hardware, rates or {}
        self._data: dict[str, Dataset | None] = {}
        self._jobs = {name: job for name, (job, _) in runs.items()}
        self.costs = {name: self._of(job, values) for name, (job, values) in runs.items()}
        """By run, of each of its stages."""

    def line(self, run: str) -> str:
        """What a run costs, in words."""
        return "; ".join(_text(cost) for cost in self.costs[run])

    def total(self, runs: Iterable[str]) -> list[str]:
        """What some runs cost together: a line for each job, and what is not known."""
        pairs = [(self._jobs[run], cost) for run in runs for cost in self.costs[run]]
        where, lines = self.hardware or "a device", []
        for job in dict.fromkeys(job for job, _ in pairs):
            some = [cost for j, cost in pairs if j == job]
            known = [cost.hours for cost in some if cost.hours is not None]
            text = f"{job}: {sum(cost.passes or 0 for cost in some):,.0f} crystals in all"
            if known:
                part = "" if len(known) == len(some) else ", as far as it is known"
                text += f", {_hours(sum(known))} of {where}{part}"
            lines.append(text)
        stages = sorted({cost.stage for _, cost in pairs if cost.rate is None})
        if stages:
            on = self.hardware or "any preset: choose one with hardware=NAME"
            lines.append(
                f"not measured: crystals/s of {', '.join(stages)} on {on}, or give "
                f"rates.{stages[0]}=N (benchmarks/training.py measures it)"
            )
        if absent := sum(cost.passes is None for _, cost in pairs):
            lines.append(f"not known: crystals of {absent} stages, whose data sets are not here")
        return lines

    def _of(self, job: str, values: Mapping[str, Any]) -> list[Cost]:
        config: Any = configure(FinetuneJob if job == "finetune" else pretrain_schema(), values)
        dataset = self._open(config.data)
        crystals, atoms = _crystals(dataset, config) if dataset else (None, ATOMS)
        out = []
        for stage in ["finetune"] if job == "finetune" else config.stages:
            passes = _passes(getattr(config, stage), crystals)
            out.append(Cost(stage, passes, atoms, self._rate(config.encoder, stage, atoms)))
        return out

    def _open(self, path: str) -> Dataset | None:
        if path not in self._data:
            try:
                self._data[path] = Dataset.open(path)
            except (ValueError, OSError):
                self._data[path] = None
        return self._data[path]

    def _rate(self, encoder: Mapping[str, Any], stage: str, atoms: float) -> float | None:
        """Measured rates are those of encoders as published, and of crystals of `ATOMS` atoms."""
        if stage in self._rates:
            return self._rates[stage]
        if self.hardware != "cpu" or set(encoder) != {"name"}:
            return None
        name = str(encoder["name"])
        rate = _WHOLE.get((name, stage))
        if rate is None and name in _STEPS and stage in _PASSES:
            rate = _STEPS[name] / _PASSES[stage]
        return rate * ATOMS / atoms if rate else None


def _crystals(dataset: Dataset, config: Any) -> tuple[int, float]:
    """Training crystals and their mean number of atoms."""
    if isinstance(config, FinetuneJob):
        items = labelled_items(dataset, config)
    else:
        items = dataset.split_items("train")
    return len(items), float(dataset.atoms[items].mean()) if len(items) else ATOMS


def _passes(section: StageConfig, crystals: int | None) -> float | None:
    if crystals is None:
        return None
    passes, steps = section.epochs * crystals, section.max_steps
    return passes if steps is None else min(passes, float(steps * section.batch_size))


def _text(cost: Cost) -> str:
    passes = "?" if cost.passes is None else f"{cost.passes:,.0f}"
    return f"{cost.stage}: {passes} crystals" + (f", {_hours(cost.hours)}" if cost.hours else "")


def _hours(hours: float) -> str:
    return f"{hours:,.1f} device-hours" if hours >= 0.1 else f"{hours * 60:.1f} device-minutes"
