"""What a finetuning run leaves behind: predictions, errors in physical units, figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crysforge.datapipe.common.safe_names import slugs
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.schema import CrystalBatch
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.base.distributed import World
from crysforge.trainer.figures import plots
from crysforge.trainer.jobs import setup as jobs
from crysforge.trainer.jobs.baselines import baselines
from crysforge.trainer.jobs.schemas import FinetuneJob
from crysforge.trainer.jobs.tables import classification_scores, errors, write_predictions
from crysforge.trainer.runs.logger import read_metrics
from crysforge.trainer.runs.trained_on import Outsiders
from crysforge.trainer.stages.finetune import FinetuneStage

if TYPE_CHECKING:
    pass


def predictions(
    stage: FinetuneStage, batches: Iterator[CrystalBatch], device: torch.device
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(ids, labels [n, T], predictions [n, T]) in physical units, in evaluation mode."""
    stage.eval()
    ids: list[str] = []
    labels, outputs = [], []
    with torch.no_grad():
        for batch in batches:
            if batch.is_dummy:
                continue
            on_device = batch.to(device)
            outputs.append(stage.predict(on_device).cpu())
            labels.append(stage.labels(batch))
            ids += batch.ids
    return ids, torch.cat(labels).double().numpy(), torch.cat(outputs).double().numpy()


def finetuned(
    stage: FinetuneStage,
    world: World,
    dataset: Dataset,
    config: FinetuneJob,
    items: Mapping[str, np.ndarray],
    path: Path,
) -> dict[str, Any]:
    """Predicts validation and test split, writes CSVs and figures into the run directory, and
    returns the numbers for metrics.json: per target and split, beside composition-only
    baselines."""
    units = {n: dataset.manifest.targets[n].unit or "" for n in config.targets}
    out: dict[str, Any] = {
        "targets": config.targets,
        "units": units,
        "seed": config.seed,
        "labels": len(items["train"]),
        "init_from": config.init_from or "none",
        "encoder": stage.encoder.section["name"],
        "data": dataset.manifest.fingerprint,
        **({} if config.fold is None else {"fold": config.fold}),
    }
    for split in ("val", "test"):
        if len(items[split]) == 0:
            continue
        stream = jobs.make_stream(
            dataset,
            split,
            stage,
            config,
            world,
            batch_size=config.finetune.batch_size,
            select=items[split],
        )
        ids, label, prediction = predictions(stage, iter(stream), world.device)
        write_predictions(path / f"predictions_{split}.csv", config.targets, ids, label, prediction)
        by_target = {
            name: _scores(label[:, i], prediction[:, i], stage.classifies)
            for i, name in enumerate(config.targets)
        }
        out[split] = by_target[config.targets[0]] if len(by_target) == 1 else by_target
        for i, (name, suffix) in enumerate(
            zip(config.targets, file_suffixes(config.targets), strict=True)
        ):
            plots.parity_plot(
                label[:, i],
                prediction[:, i],
                name,
                units[name],
                path / f"parity_{split}{suffix}.png",
            )
    if len(items["train"]) and len(items["test"]):
        out["baselines"] = {n: _baselines(dataset, n, items) for n in config.targets}
    if len(items["train"]):
        history = read_metrics(path, "finetune")
        plots.learning_curves(history, path / "learning_curves.png", units)
    return out


def _scores(label: np.ndarray, prediction: np.ndarray, classes: bool) -> dict[str, float]:
    """Errors of a target; of a classification also accuracy, F1 and area under the ROC curve."""
    known = ~np.isnan(label)
    found = classification_scores(label[known], prediction[known]) if classes else {}
    return {**errors(label, prediction), **found}


def _baselines(dataset: Dataset, target: str, items: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Test MAE of predictors that see the composition only, from the same labels."""
    parts = {}
    for split, chosen in items.items():
        labels = dataset.targets_of(target)
        numbers, values = [], []
        for item, crystal in dataset.read(chosen[~np.isnan(labels[chosen])]):
            if isinstance(crystal, Crystal):
                numbers.append(crystal.numbers)
                values.append(labels[item])
        parts[split] = (numbers, np.array(values))
    return baselines(parts["train"], parts["val"], parts["test"])


@dataclasses.dataclass
class Predicted:
    """What became of the crystals that a model was asked about."""

    outsiders: Outsiders
    """Crystals unlike those that it learned from."""
    written: int = 0
    dropped: int = 0


def file_suffixes(targets: Sequence[str]) -> list[str]:
    """What file names of each target end with: nothing where there is one."""
    return [""] if len(targets) == 1 else [f"_{part}" for part in slugs(targets)]


def scores_of(metrics: Mapping[str, Any], split: str, target: str) -> dict[str, Any]:
    """Errors of a target in metrics.json, which has no level of targets where there is one."""
    return metrics[split] if len(metrics["targets"]) == 1 else metrics[split][target]


def summary(metrics: Mapping[str, Any], path: Path) -> str:
    """The result as a few lines for people."""
    lines = []
    for name in metrics["targets"]:
        unit = metrics["units"][name]
        for split in ("val", "test"):
            if split in metrics:
                one = scores_of(metrics, split, name)
                lines.append(
                    f"{split} MAE of {name}: {one['mae']:.4g} {unit} ({one['n']} crystals)"
                )
                if "roc_auc" in one:
                    lines[-1] += f", ROC AUC {one['roc_auc']:.4g}, accuracy {one['accuracy']:.4g}"
        for kind, mae in metrics.get("baselines", {}).get(name, {}).items():
            lines.append(f"  {kind} (composition only): {mae:.4g} {unit}")
    lines += [f"metrics: {path / 'metrics.json'}", f"tensorboard: {path / 'tensorboard'}"]
    return "\n".join(lines)
