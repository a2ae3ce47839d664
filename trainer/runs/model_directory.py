"""Models for others to use: a directory with weights, config and scaler that needs nothing else.

    config.yaml         what rebuilds it: encoder section, stage, its settings; and what is known of
                        it: data, where its weights started, versions (exported: results, licence)
    scaler.json         finetuned models: target names, units, mean and std of the labels
    model.safetensors   full fp32 weights of the stage; the encoder's names start with `encoder.`;
                        written last
    README.md           exported models: the model card, see trainer/runs/card.py

Every stage of a run writes one, RUN/<stage>/. Reading one runs nothing of it: see
trainer/base/safe_read.py. Schema 1 called config.yaml model.yaml, and put a finetuned model into
RUN itself; it is read as well.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from crysforge import __version__
from crysforge.datapipe.common.checked import Finite, Line, Name, between, checked
from crysforge.datapipe.common.config import refuse_references
from crysforge.datapipe.common.files import make_directory, sha256, write_json, write_text
from crysforge.datapipe.common.safe_read import read_mapping, to_yaml
from crysforge.datapipe.crystals.cells import cells_of, extensive_of
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.encoders import Encoder, build_encoder
from crysforge.models.encoders.base import GRAPH_ONLY
from crysforge.trainer.base.safe_read import PICKLES, at_most, check_tensor_file
from crysforge.trainer.base.tensors import code_version, load_into, load_tensors, save_tensors
from crysforge.trainer.runs.checkpoint import MAX_RECORD, RunDirectory
from crysforge.trainer.runs.data_section import check_data
from crysforge.trainer.runs.forms import MODEL, RUN
from crysforge.trainer.stages.base import STAGES, Stage

SCHEMA = 2
CONFIG, WEIGHTS, SCALER = "config.yaml", "model.safetensors", "scaler.json"
OLD_CONFIG = "model.yaml"
"""Name of the config in schema 1."""
MAX_PROVENANCE = 100_000
"""Characters of a data set's provenance that a model repeats."""


@dataclass
class Scaler:
    """Standardisation of labels: value = mean + std · output."""

    targets: list[Name]
    units: list[Line]
    mean: list[Finite]
    std: list[Annotated[float, between(0, 1e300)]]

    def __post_init__(self) -> None:
        if len({*map(len, vars(self).values())}) > 1 or not self.targets:
            raise ValueError("it must hold targets, units, mean and std of each target")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError("a target is there twice")


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
            encoder = self.new_encoder()
        load_into(encoder, self.weights("encoder."), str(self.file))
        return encoder.eval()

    def new_encoder(self) -> Encoder:
        """An encoder of that kind, with fresh weights."""
        return build_encoder(self.encoder)

    def build_stage(self) -> Stage:
        """The whole stage with its trained weights, in evaluation mode.

        Raises:
            ValueError: an unknown stage; a finetuned model without a scaler, or with that of
                another; weights that are not those that the config describes.
        """
        with self._limit():
            stage = STAGES[self.stage].from_exported(self)
        return stage.eval()

    @property
    def finetuned(self) -> bool:
        """Whether it predicts properties."""
        return self.stage in STAGES and STAGES[self.stage].learns_from_labels

    def _limit(self) -> Any:
        check_tensor_file(self.file)
        return at_most(self.file.stat().st_size // 4, f"{self.path}: its config")


def describe_stage(
    path: Path,
    stage: Stage,
    data: Mapping[str, Any],
    scaler: Scaler | None = None,
    start: Mapping[str, Any] | None = None,
) -> None:
    """Writes what is known of a stage's model before it is trained: all but its weights. With a
    checkpoint of the run this is a model too, see `open_checkpoint`."""
    make_directory(path)
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
    write_text(path / CONFIG, to_yaml(config))


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What a model says of the data set that it was trained on."""
    manifest, splits = dataset.manifest, dataset.manifest.splits
    if dataset.fold is not None:
        splits = {split: len(dataset.split_items(split)) for split in splits}
    provenance: dict[str, Any] = manifest.provenance
    if len(json.dumps(provenance)) > MAX_PROVENANCE:
        provenance = {"see": "the manifest of the data set"}
    extensive = [n for n in extensive_of(manifest.provenance) if n in manifest.targets]
    return {
        "fingerprint": manifest.fingerprint,
        "cell": cells_of(manifest.provenance).describe(),
        **({"extensive": extensive} if extensive else {}),
        **({} if dataset.fold is None else {"fold": dataset.fold}),
        "splits": dict(splits),
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
        finished = read_mapping(root / "run.json", RUN, MAX_RECORD).get("finished")
        if not finished:
            raise ValueError(
                f"{root} is a run without a finished stage: let it finish first, or export one of "
                "its checkpoints (launch/export.py tag=newest)"
            )
        if stage and stage not in finished:
            raise ValueError(
                f"{root} has no finished stage {stage!r}; finished: {', '.join(finished)}"
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
    tags = [p for name in identity.get("stages", ["finetune"]) for p in run.tags(name)]
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
            f"{root / name} has schema {repr(config.get('schema'))[:40]}, this version reads 1 to "
            f"{SCHEMA}"
        )
    config = checked(MODEL, config, str(root / name))
    for part in ("encoder", "settings"):
        refuse_references(config[part], f"{root / name}: ", part)
    check_data(config["data"], str(root / name))
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
    return checked(Scaler, read_mapping(path), str(path))


def _stage_directory(root: Path, stage: str) -> Path:
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


def _versions() -> dict[str, str]:
    code = {k: v for k, v in code_version().items() if k != "version"}
    return {
        "crysforge": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        **code,
    }


def take_encoder(exported: Exported, section: Mapping[str, Any]) -> Encoder:
    """The trained encoder, after checking that it is the one the config asks for. What changes its
    graph alone (`GRAPH_ONLY`) is as the config says, where it does.

    Raises:
        ValueError: the config's encoder section names another encoder or another setting.
    """
    asked = build_encoder(section).section if section else {}
    chosen = {key: asked[key] for key in GRAPH_ONLY if key in asked}
    if asked:
        for key, value in asked.items():
            if key not in chosen and exported.encoder.get(key) != value:
                raise ValueError(
                    f"{exported.path} holds encoder {exported.encoder.get('name')!r} with {key}="
                    f"{exported.encoder.get(key)!r}, but the config asks for {asked['name']!r} "
                    f"with {key}={value!r}: make the 'encoder' section agree, or leave it out"
                )
    return replace(exported, encoder={**exported.encoder, **chosen}).build_encoder()
