"""Pieces that the launch scripts put together: streams, stages, run identity."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.encoders import Encoder
from crysforge.trainer.base.agreement import same_file
from crysforge.trainer.base.distributed import World
from crysforge.trainer.base.tensors import load_into
from crysforge.trainer.engines.base import EngineConfig
from crysforge.trainer.jobs.labels import class_statistics, standardisation
from crysforge.trainer.jobs.schemas import FinetuneJob, JobConfig
from crysforge.trainer.jobs.starting import seed_everything, starting_encoder
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.model_directory import Scaler, describe_data, open_model
from crysforge.trainer.stages.base import STAGES, Saved, Stage, StageConfig, count_parameters
from crysforge.trainer.stages.finetune import FinetuneStage

TIES_ARE_CUT = (
    "graph.ties=cut: rounding chooses among equal neighbours, so equal atoms differ and quotient "
    "graphs are off"
)
LOOKED_AT = 20_000
"""Crystals that a stage looks at before it learns."""


def check_splits(dataset: Dataset, data: str, *names: str) -> None:
    """Raises ValueError naming a split that the data set lacks."""
    for name in names:
        if len(dataset.split_items(name)) == 0:
            raise ValueError(f"data set {data} has no crystals in its {name!r} split")


def splits_needed(sections: Mapping[str, StageConfig]) -> list[str]:
    """The parts of a data set that stages cannot do without."""
    best = any(getattr(section, "keep_weights", "last") == "best" for section in sections.values())
    return ["train", "val"] if best else ["train"]


def learned_from(
    dataset: Dataset, items: np.ndarray, start: Mapping[str, Any] | None, read: bool
) -> dict[str, Any]:
    """What a model says of its data, and of the crystals that it learns from.

    Args:
        items: those crystals; without any, the model stays that of `start`, and so does what it
            learned from.
        start: see `lineage`.
        read: whether to read them for their elements; else these are those of all splits.
    """
    data = describe_data(dataset)
    if len(items):
        data["seen"] = _seen(dataset, items, read)
    elif start is not None:
        data |= {name: start["data"].get(name) for name in ("cell", "extensive", "seen")}
    return data


def _seen(dataset: Dataset, items: np.ndarray, read: bool) -> dict[str, Any]:
    """`elements` of crystals, the least and most `atoms` in their cells, and `volume_per_atom` in
    Å³."""
    elements = set() if read else set(dataset.manifest.elements)
    for _, crystal in dataset.read(items) if read else ():
        if isinstance(crystal, Crystal):
            elements.update(crystal.numbers.tolist())
    atoms, volume = dataset.atoms[items], dataset.volume[items] / dataset.atoms[items]
    return {
        "elements": sorted(elements),
        "atoms": [int(atoms.min()), int(atoms.max())],
        "volume_per_atom": [round(float(v), 4) for v in (volume.min(), volume.max())],
    }


def new_stage(
    name: str,
    section: StageConfig,
    encoder: Encoder,
    before: Saved | None,
    config: JobConfig,
    dataset: Dataset,
) -> Stage:
    """A pretraining stage that starts from an encoder and what the stage before has left; one that
    wants to has looked at training crystals: at `LOOKED_AT` of them, evenly spread."""
    seed_everything(config.seed, name)
    stage = STAGES[name](section, encoder)
    if type(stage).look is not Stage.look:
        items = dataset.split_items("train")
        items = items[:: -(-len(items) // LOOKED_AT)]
        found = (crystal for _, crystal in dataset.read(items.tolist()))
        stage.look(c for c in found if isinstance(c, Crystal))
    if before is not None:
        stage.take(before)
    return stage


def make_stream(
    dataset: Dataset,
    split: str,
    stage: Stage,
    config: JobConfig,
    world: World,
    *,
    batch_size: int,
    epochs: float | None = None,
    select: np.ndarray | None = None,
) -> Stream:
    """A stage's stream over a split: endless shuffled epochs for training when `epochs` is given,
    else one ordered pass."""
    return Stream(
        dataset,
        split,
        stage.encoder.graph,
        config.loader,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        quotient=config.graph.quotient,
        batch_size=batch_size,
        transform=stage.transform(),
        select=select,
        min_atoms=stage.min_atoms,
        epochs=epochs,
        train=epochs is not None,
    )


def identity(
    config: JobConfig, dataset: Dataset, encoder: Encoder, sections: Mapping[str, Any]
) -> dict:
    """What must not change when a run is continued, as JSON: data, seed, encoder, stage settings.

    Number of ranks, ZeRO stage, precision, logging and loader workers may change.
    """
    value = {
        "data": dataset.manifest.fingerprint,
        **({} if config.fold is None else {"fold": config.fold}),
        "seed": config.seed,
        "encoder": encoder.section,
        "init_from": config.init_from,
        **({"init_stage": config.init_stage} if config.init_stage else {}),
        **sections,
    }
    return json.loads(json.dumps(value))


def claim(
    run: RunDirectory, world: World, config_yaml: str, identity: Mapping[str, Any], resume: str
) -> dict[str, Any]:
    """Rank 0 claims the run directory; every rank gets its run.json, and sees it where it is."""
    defaults = {name: settings_of(STAGES[name].Config()) for name in identity if name in STAGES}
    record = run.start(config_yaml, identity, resume, defaults) if world.main else {}
    record = world.share(record)
    same_file(world.meeting, run.path / "run.json")
    return record


def finetune_stage(
    config: FinetuneJob, dataset: Dataset, train: np.ndarray
) -> tuple[FinetuneStage, Scaler]:
    """What a finetuning trains, and how its labels are standardised: by those of the training
    crystals, or, with its head, as in the run it starts from.

    Raises:
        ValueError: `init_head`, but that run has no readout, or one for other targets, units or
            settings.
    """
    encoder = starting_encoder(config, dataset)
    units = [dataset.manifest.targets[name].unit or "" for name in config.targets]
    known = open_model(config.init_from, config.init_stage) if config.init_head else None
    if known is None:
        labels = np.stack([dataset.targets_of(name)[train] for name in config.targets], axis=1)
        if config.finetune.task == "classification":
            mean, std = class_statistics(labels, config.targets)
        else:
            mean, std = standardisation(labels.tolist())
    elif known.scaler is None or len(known.scaler.targets) != len(config.targets):
        raise ValueError(
            f"init_head=true, but {config.init_from} was not finetuned on as many targets as are "
            f"asked for here ({', '.join(config.targets)})"
        )
    else:
        for name, unit, learned in zip(config.targets, units, known.scaler.units, strict=True):
            if unit and learned and unit.replace(" ", "") != learned.replace(" ", ""):
                raise ValueError(
                    f"init_head=true: {config.init_from} predicts in {learned}, but {name} of "
                    f"{config.data} is in {unit}: convert the labels"
                )
        mean, std = known.scaler.mean, known.scaler.std
    seed_everything(config.seed, "finetune")
    stage = FinetuneStage(config.finetune, encoder, config.targets, mean, std)
    if known is not None:
        load_into(stage.readout, known.weights("readout."), str(known.file))
    return stage, Scaler(config.targets, units, mean, std)


def plan_text(stage: Stage, stream: Stream, config: Any, world: World, accumulation: int) -> str:
    """What a stage will do, for the log and `--dry-run`."""
    steps = stream.total_steps // accumulation
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    cut = "\n" + TIES_ARE_CUT if stage.encoder.graph.cut_ties else ""
    return (
        f"{stage.name}: {stream.epoch_size} crystals, {steps} steps of {config.batch_size}, "
        f"{count_parameters(stage):,} parameters ({count_parameters(stage.encoder):,} in the "
        f"encoder), {world.size} rank(s){cut}"
    )


def settings_of(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def micro_batch(section: StageConfig, trainer: EngineConfig) -> int:
    """Crystals per micro-batch over all ranks. Raises ValueError if accumulation does not divide
    the batch size."""
    if section.batch_size % trainer.accumulation:
        raise ValueError(
            f"batch_size={section.batch_size} is not a multiple of "
            f"trainer.accumulation={trainer.accumulation}"
        )
    return section.batch_size // trainer.accumulation
