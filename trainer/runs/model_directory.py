"""Models for others to use: a directory with weights, config and scaler that needs nothing else.

    config.yaml         what rebuilds it: encoder section, stage, its settings; and what is known of
                        it: data, where its weights started, versions (exported: results, licence)
    scaler.json         finetuned models: target names, units, mean and std of the labels
    model.safetensors   full fp32 weights of the stage; the encoder's names start with `encoder.`;
                        written last
    README.md           exported models: the model card, see trainer/runs/card.py

Every stage of a run writes one, RUN/<stage>/. Reading one runs nothing of it: see
trainer/base/safe_read.py. Schema 1 called config.yaml model.yaml, and put a finetuned model into RUN
itself; it is read as well.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from crysforge.datapipe.storage.manifest import Manifest
from crysforge.models import __version__
from crysforge.models.encoders import Encoder, build_encoder
from crysforge.models.registry import configure
from crysforge.trainer.base.safe_read import (
    PICKLES,
    at_most,
    check_tensor_file,
    read_mapping,
    read_object,
)
from crysforge.trainer.base.tensors import (
    code_version,
    load_into,
    load_tensors,
    save_tensors,
    sha256,
    write_json,
    write_text,
)
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.data_section import check_data
from crysforge.trainer.stages import FinetuneStage
from crysforge.trainer.stages.base import STAGES, Stage

SCHEMA = 2
CONFIG, WEIGHTS, SCALER = "config.yaml", "model.safetensors", "scaler.json"
OLD_CONFIG = "model.yaml"
"""Name of the config in schema 1."""
STAGE_NAME = re.compile(r"[a-z][a-z0-9_]*")
MAX_PROVENANCE = 100_000
"""Characters of a data set's provenance that a model repeats."""


@dataclass
class Scaler:
    """Standardisation of labels: value = mean + std · output."""

    targets: list[str]
    units: list[str]
    mean: list[float]
    std: list[float]


@dataclass
class Exported:
    """A model directory, read but not built."""

    path: Path
    encoder: dict[str, Any]
    stage: str
    settings: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] | None = None
    """What the encoder's weights were before this stage, see `lineage`; None: random."""
    versions: dict[str, Any] = field(default_factory=dict)
    scaler: Scaler | None = None

    @property
    def file(self) -> Path:
        """Where its weights are."""
        return self.path / WEIGHTS

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Tensors of the stage whose names start with `prefix`, without it.

        Raises:
            ValueError: the file is missing, no safetensors, damaged, or has values that are not
                finite.
        """
        out = {}
        for name, tensor in load_tensors(self.file).items():
            if name.startswith(prefix):
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{self.file} is of no use: {name} has NaN or infinite values")
                out[name.removeprefix(prefix)] = tensor
        return out

    def build_encoder(self) -> Encoder:
        """The encoder with its trained weights, in evaluation mode.

        Raises:
            ValueError: the weights are missing, damaged or not those that the config describes.
        """
        with self._limit():
            encoder = build_encoder(self.encoder)
        load_into(encoder, self.weights("encoder."), str(self.file))
        return encoder.eval()

    def build_stage(self) -> Stage:
        """The whole stage with its trained weights, in evaluation mode.

        Raises:
            ValueError: an unknown stage; a finetuned model without a scaler, or with that of
                another; weights that are not those that the config describes.
        """
        with self._limit():
            encoder = build_encoder(self.encoder)
            stage = self._finetuned(encoder) if self.finetuned else self._pretraining(encoder)
        weights = self.weights()
        load_into(stage, weights, str(self.file))
        if self.scaler is not None and self.finetuned:
            for name in ("mean", "std"):
                if weights[name].tolist() != _float32(getattr(self.scaler, name)):
                    raise ValueError(
                        f"{self.path / SCALER} is of another model: its {name} is not the one that "
                        f"{WEIGHTS} was trained with"
                    )
        return stage.eval()

    @property
    def finetuned(self) -> bool:
        """Whether it predicts properties."""
        return self.stage == FinetuneStage.name

    def _limit(self) -> Any:
        check_tensor_file(self.file)
        return at_most(self.file.stat().st_size // 4, f"{self.path}: its config")

    def _finetuned(self, encoder: Encoder) -> Stage:
        scaler = self.scaler
        if scaler is None:
            raise ValueError(f"{self.path} has no {SCALER}: its run did not finish")
        config = configure(FinetuneStage.Config, self.settings, "settings")
        return FinetuneStage(config, encoder, scaler.targets, scaler.mean, scaler.std)

    def _pretraining(self, encoder: Encoder) -> Stage:
        cls: Any = STAGES[self.stage]
        return cls(configure(cls.Config, self.settings, "settings"), encoder)


def describe_stage(
    path: Path,
    stage: Stage,
    data: Mapping[str, Any],
    scaler: Scaler | None = None,
    start: Mapping[str, Any] | None = None,
) -> None:
    """Writes what is known of a stage's model before it is trained: all but its weights. With a
    checkpoint of the run this is a model too, see `open_checkpoint`."""
    path.mkdir(parents=True, exist_ok=True)
    if scaler is not None:
        write_json(path / SCALER, asdict(scaler))
    config = {
        "schema": SCHEMA,
        "stage": stage.name,
        **({"targets": scaler.targets} if scaler else {}),
        "encoder": stage.encoder.section,
        "settings": asdict(stage.config),
        "data": dict(data),
        "start": None if start is None else dict(start),
        "versions": _versions(),
    }
    write_config(path, config)


def export_stage(
    path: Path,
    stage: Stage,
    weights: Mapping[str, Tensor],
    data: Mapping[str, Any],
    scaler: Scaler | None = None,
    start: Mapping[str, Any] | None = None,
) -> None:
    """Writes a stage's model files into `path`; other files there stay. The weights come last and
    make the directory a model.

    Args:
        weights: full fp32 state dict of the stage.
        data: what it learned from, see `describe_data`.
        scaler: of a finetuned model.
        start: see `lineage`.
    """
    describe_stage(path, stage, data, scaler, start)
    save_tensors(path / WEIGHTS, weights)


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Replaces the config of a model directory."""
    plain = json.loads(json.dumps(config))  # no tuples, no object twice
    write_text(path / CONFIG, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def describe_data(manifest: Manifest, **more: Any) -> dict[str, Any]:
    """What a model says of the data set that it was trained on; `more` goes beside it."""
    provenance: dict[str, Any] = manifest.provenance
    if len(json.dumps(provenance)) > MAX_PROVENANCE:
        provenance = {"see": "the manifest of the data set"}
    return {
        "fingerprint": manifest.fingerprint,
        **more,
        "splits": dict(manifest.splits),
        "targets": {name: asdict(target) for name, target in manifest.targets.items()},
        "elements": list(manifest.elements),
        "provenance": provenance,
    }


def lineage(path: str | Path, stage: str = "") -> dict[str, Any] | None:
    """What a model says of the one whose encoder it started from; None without a `path`."""
    if not path:
        return None
    origin = open_model(path, stage)
    return {
        "stage": origin.stage,
        "weights_sha256": sha256(origin.file),
        "data": origin.data,
        "start": origin.start,
    }


def open_model(path: str | Path, stage: str = "") -> Exported:
    """Finds the model in a run or model directory.

    Args:
        path: a finetuning run, a pretraining run (its last finished stage, or `stage`), or the
            directory of one stage or of an exported model.

    Raises:
        ValueError: nothing there, an unfinished run, an unknown stage or schema, or files that
            are not what a model has: see trainer/base/safe_read.py.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"checkpoint directory {str(path)!r} does not exist")
    if (root / "run.json").is_file() and not (root / OLD_CONFIG).is_file():
        finished = read_object(root / "run.json").get("finished")
        if not finished:
            raise ValueError(
                f"{root} is a run without a finished stage: let it finish first, or export one of "
                "its checkpoints (launch/export.py tag=newest)"
            )
        if stage and stage not in finished:
            raise ValueError(
                f"{root} has no finished stage {stage!r}; finished: {', '.join(map(str, finished))}"
            )
        root = _stage_directory(root, stage or finished[-1])
    exported = read_model(root)
    if not exported.file.exists():
        raise ValueError(_without_weights(root))
    check_tensor_file(exported.file)
    return exported


def open_checkpoint(path: str | Path, tag: str = "") -> tuple[Exported, dict[str, Tensor], str]:
    """A model from a checkpoint of a run, finished or not: what describes it, its weights (the
    best so far, or their average, where the run keeps one), and the checkpoint's name.

    Args:
        path: of the run. tag: name of the checkpoint; default the newest of the newest stage.

    Raises:
        ValueError: no run, no such checkpoint, or a damaged one.
    """
    run = RunDirectory(path)
    identity = run.read()["identity"]
    tags = [p for name in identity.get("stages", [FinetuneStage.name]) for p in run.tags(name)]
    chosen = next((p for p in reversed(tags) if tag in ("", p.name)), None)
    if chosen is None:
        there = ", ".join(p.name for p in tags) or "none"
        raise ValueError(
            f"{run.path} has no checkpoint{f' {tag!r}' if tag else ''}; it has: {there}"
        )
    try:
        checkpoint = run.load(chosen)
    except ValueError:
        if (chosen / "COMPLETE").is_file():
            raise
        return open_checkpoint(path, tag)  # the run goes on, and has deleted it meanwhile
    exported = read_model(_stage_directory(run.path, checkpoint.stage))
    weights = checkpoint.best or {**checkpoint.model, **checkpoint.average}
    return exported, weights, checkpoint.tag


def read_model(root: Path) -> Exported:
    """What a model directory says of itself; its weights need not be there yet."""
    old = (root / OLD_CONFIG).is_file()
    name = OLD_CONFIG if old else CONFIG
    if not (root / name).is_file():
        raise ValueError(f"{root} holds no model (no {CONFIG}): give a run or model directory")
    config = read_mapping(root / name)
    if config.get("schema") != (1 if old else SCHEMA):
        raise ValueError(
            f"{root / name} has schema {config.get('schema')!r}, this version reads 1 to {SCHEMA}"
        )
    kinds = {"encoder": dict, "stage": str, "settings": dict, "data": dict, "start": dict | None}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{root / name} is damaged: {key!r} is missing or of the wrong kind")
    check_data(config["data"], str(root / name))
    if not STAGE_NAME.fullmatch(config["stage"]):
        raise ValueError(f"{root / name} is damaged: {config['stage']!r} is no name of a stage")
    if "${" in repr([config["encoder"], config["settings"]]):
        raise ValueError(f"{root / name} refers to values elsewhere (${{…}}): write them out")
    exported = Exported(
        path=root,
        encoder=config["encoder"],
        stage=config["stage"],
        settings=config["settings"],
        data=config["data"],
        start=config.get("start"),
        versions=config.get("versions") or {"crysforge": config.get("version")},
        scaler=read_scaler(root / SCALER) if (root / SCALER).exists() else None,
    )
    targets = config.get("targets")
    if exported.scaler and targets is not None and targets != exported.scaler.targets:
        raise ValueError(
            f"{root / SCALER} is of another model: it has {', '.join(exported.scaler.targets)}, "
            f"{name} has {targets}"
        )
    return exported


def read_scaler(path: Path) -> Scaler:
    """A scaler from its file. Raises ValueError if it is none."""
    values = read_object(path)
    names = [f.name for f in dataclasses.fields(Scaler)]
    lists: list[Any] = [values.get(name) for name in names]
    texts, numbers = lists[:2], lists[2:]
    if (
        values.keys() != set(names)
        or not all(isinstance(items, list) and len(items) == len(lists[0]) for items in lists)
        or not all(isinstance(item, str) for items in texts for item in items)
        or not all(isinstance(item, int | float) for items in numbers for item in items)
    ):
        raise ValueError(f"{path} is no scaler: it must hold {', '.join(names)} of each target")
    return Scaler(**values)


def _stage_directory(root: Path, stage: Any) -> Path:
    if not isinstance(stage, str) or not STAGE_NAME.fullmatch(stage):
        raise ValueError(f"{root / 'run.json'} is damaged: {stage!r} is no name of a stage")
    path = root / stage
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} is a link out of the run: give the directory it leads to")
    return path


def _without_weights(root: Path) -> str:
    pickles = sorted(p.name for p in root.iterdir() if p.suffix in PICKLES)
    if pickles:
        return (
            f"{root} has {pickles[0]} and no {WEIGHTS}: pickles may run code and are not read; ask "
            "for the model as safetensors"
        )
    return f"{root} has no {WEIGHTS}: its training did not finish, or the copy is not complete"


def _float32(values: Sequence[float]) -> list[float]:
    return torch.tensor(list(values), dtype=torch.float32).tolist()


def _versions() -> dict[str, str]:
    code = {k: v for k, v in code_version().items() if k != "version"}
    return {
        "crysforge": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        **code,
    }


def take_encoder(exported: Exported, section: Mapping[str, Any]) -> Encoder:
    """The trained encoder, after checking that it is the one the config asks for.

    Raises:
        ValueError: the config's encoder section names another encoder or another setting.
    """
    if section:
        asked = build_encoder(section).section
        for key, value in asked.items():
            if exported.encoder.get(key) != value:
                raise ValueError(
                    f"{exported.path} holds encoder {exported.encoder['name']!r} with {key}="
                    f"{exported.encoder.get(key)!r}, but the config asks for {asked['name']!r} "
                    f"with {key}={value!r}: make the 'encoder' section agree, or leave it out"
                )
    return exported.build_encoder()
