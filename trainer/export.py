"""Models for others to use: a directory with weights, config and scaler that needs nothing else.

model.safetensors   full fp32 weights of the stage; the encoder's names start with `encoder.`
model.yaml          what rebuilds it: encoder section, stage, its settings, the data's identity
scaler.json         finetuned models: target names, units, mean and std of the labels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from models import __version__
from models.encoders import Encoder, build_encoder
from trainer.config import read_yaml
from trainer.files import (
    load_into,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
    write_text,
)
from trainer.stage import Stage

SCHEMA = 1


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
    scaler: Scaler | None = None

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the stage."""
        return load_tensors(self.path / "model.safetensors")

    def build_encoder(self) -> Encoder:
        """The encoder with its trained weights, in evaluation mode."""
        encoder = build_encoder(self.encoder)
        own = {
            k.removeprefix("encoder."): v
            for k, v in self.weights().items()
            if k.startswith("encoder.")
        }
        load_into(encoder, own, str(self.path / "model.safetensors"))
        return encoder.eval()


def export_stage(
    path: Path,
    stage: Stage,
    weights: Mapping[str, Tensor],
    data: Mapping[str, Any],
    scaler: Scaler | None = None,
) -> None:
    """Writes a stage's model files into `path`; other files there stay. model.yaml comes last and
    makes the directory a model."""
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / "model.safetensors", weights)
    if scaler is not None:
        write_json(path / "scaler.json", asdict(scaler))
    config = {
        "schema": SCHEMA,
        "version": __version__,
        "encoder": stage.encoder.section,
        "stage": stage.name,
        "settings": asdict(stage.config),
        "data": dict(data),
    }
    write_text(path / "model.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))


def open_model(path: str | Path, stage: str = "") -> Exported:
    """Finds the model in a run or model directory.

    Args:
        path: a finetuning run, a pretraining run (its last finished stage, or `stage`), or the
            directory of one stage.

    Raises:
        ValueError: nothing there, an unfinished run, an unknown stage or schema.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"checkpoint directory {str(path)!r} does not exist")
    if (root / "run.json").is_file() and not (root / "model.yaml").is_file():
        finished = read_json(root / "run.json")["finished"]
        if not finished:
            raise ValueError(f"{root} is a run without a finished stage: let it finish first")
        if stage and stage not in finished:
            raise ValueError(
                f"{root} has no finished stage {stage!r}; finished: {', '.join(finished)}"
            )
        root = root / (stage or finished[-1])
    if not (root / "model.yaml").is_file():
        raise ValueError(f"{root} holds no model (no model.yaml): give a run directory")
    config = OmegaConf.to_container(read_yaml(root / "model.yaml"))
    assert isinstance(config, dict)
    if config.get("schema") != SCHEMA:
        raise ValueError(f"{root} has schema {config.get('schema')!r}, this version reads {SCHEMA}")
    scaler = root / "scaler.json"
    return Exported(
        path=root,
        encoder=config["encoder"],
        stage=config["stage"],
        settings=config["settings"],
        data=config["data"],
        scaler=Scaler(**read_json(scaler)) if scaler.is_file() else None,
    )


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


def standardisation(labels: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each target's present labels, [labels, targets]."""
    values = torch.tensor(labels, dtype=torch.float64)
    present = ~values.isnan()
    count = present.sum(0).clamp(min=1)
    mean = values.nan_to_num().sum(0) / count
    square = ((values - mean).nan_to_num() ** 2 * present).sum(0) / count
    return mean.tolist(), square.sqrt().tolist()
