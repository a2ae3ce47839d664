"""What a finetuning run leaves behind: predictions, errors in physical units, figures."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch

from datapipe.crystal import Crystal
from datapipe.schema import CrystalBatch
from datapipe.shards import Dataset
from datapipe.sources import Failure
from trainer import jobs, plots
from trainer.baselines import baselines
from trainer.distributed import World
from trainer.logger import read_metrics
from trainer.settings import FinetuneJob
from trainer.stages import FinetuneStage

if TYPE_CHECKING:
    from trainer.ensemble import Ensemble
    from trainer.predictor import Predictor


def predictions(
    stage: FinetuneStage, batches: Iterator[CrystalBatch], device: torch.device
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(ids, labels [n, T], predictions [n, T]) in physical units, in evaluation mode."""
    stage.eval()
    ids: list[str] = []
    labels, outputs = [], []
    with torch.no_grad():
        for batch in batches:
            if batch.filler:
                continue
            on_device = batch.to(device)
            outputs.append(stage.predict(on_device).cpu())
            labels.append(stage.labels(batch))
            ids += batch.ids
    return ids, torch.cat(labels).double().numpy(), torch.cat(outputs).double().numpy()


def errors(label: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """MAE, RMSE and R² over the crystals that have a label."""
    present = ~np.isnan(label)
    difference = prediction[present] - label[present]
    spread = float(np.sum((label[present] - label[present].mean()) ** 2))
    return {
        "n": int(present.sum()),
        "mae": float(np.abs(difference).mean()),
        "rmse": float(np.sqrt((difference**2).mean())),
        "r2": 1 - float((difference**2).sum()) / spread if spread > 0 else float("nan"),
    }


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
            name: errors(label[:, i], prediction[:, i]) for i, name in enumerate(config.targets)
        }
        out[split] = by_target[config.targets[0]] if len(by_target) == 1 else by_target
        for i, name in enumerate(config.targets):
            suffix = "" if len(config.targets) == 1 else f"_{name}"
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


def write_predictions(
    path: Path,
    targets: list[str],
    ids: list[str],
    label: np.ndarray,
    prediction: np.ndarray,
) -> None:
    """A CSV `id,target,prediction` (several targets: `id,target_<name>,prediction_<name>,…`);
    labels that are missing stay empty."""
    columns: dict[str, np.ndarray] = {}
    for i, suffix in enumerate(suffixes(targets)):
        columns |= {f"target{suffix}": label[:, i], f"prediction{suffix}": prediction[:, i]}
    write_table(path, ids, columns)


def write_table(path: Path, ids: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
    """A CSV of numbers for each crystal, in one step; NaN stays empty."""
    with _replacing(path) as file:
        writer = csv.writer(file)
        writer.writerow(["id", *columns])
        for id, *values in zip(ids, *columns.values(), strict=True):
            writer.writerow([id, *map(_cell, values)])


def predict_to_csv(
    model: Predictor | Ensemble, crystals: Iterable[Crystal | Failure], output: Path, max_atoms: int
) -> tuple[int, int]:
    """Writes predictions as they come, and beside them the crystals that could not be used;
    returns how many of each. The files appear when all are written; of predictions none does where
    there is none."""
    counts = {"written": 0, "dropped": 0}
    with _replacing(dropped_path(output)) as bad, contextlib.suppress(_NothingWritten):
        drops = csv.writer(bad)
        drops.writerow(["id", "where", "reason", "message"])

        def usable() -> Iterator[Crystal]:
            for item in crystals:
                if isinstance(item, Crystal):
                    yield item
                else:
                    counts["dropped"] += 1
                    drops.writerow([item.id, item.where, item.reason, item.message])

        with _replacing(output) as file:
            writer = csv.writer(file)
            writer.writerow(["id", *model.columns])
            for crystal, values in model.iterate(usable(), max_atoms):
                writer.writerow([crystal.id, *(_cell(v) for v in values)])
                counts["written"] += 1
            if not counts["written"]:
                raise _NothingWritten
    if not counts["dropped"]:
        dropped_path(output).unlink()
    return counts["written"], counts["dropped"]


class _NothingWritten(Exception):
    """Keeps a file without a prediction from taking its place."""


def dropped_path(output: Path) -> Path:
    """Where the crystals are listed that have no prediction."""
    return output.with_name(f"{output.stem}.dropped.csv")


def suffixes(targets: Sequence[str]) -> list[str]:
    """What column names of each target end with: nothing where there is one."""
    return [""] if len(targets) == 1 else [f"_{name}" for name in targets]


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.7g}"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def summary(metrics: Mapping[str, Any], path: Path) -> str:
    """The result as a few lines for people."""
    lines = []
    for name in metrics["targets"]:
        unit = metrics["units"][name]
        for split in ("val", "test"):
            if split in metrics:
                one = metrics[split] if "mae" in metrics[split] else metrics[split][name]
                lines.append(
                    f"{split} MAE of {name}: {one['mae']:.4g} {unit} ({one['n']} crystals)"
                )
        for kind, mae in metrics.get("baselines", {}).get(name, {}).items():
            lines.append(f"  {kind} (composition only): {mae:.4g} {unit}")
    lines += [f"metrics: {path / 'metrics.json'}", f"tensorboard: {path / 'tensorboard'}"]
    return "\n".join(lines)
