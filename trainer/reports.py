"""What a finetuning run leaves behind: predictions, errors in physical units, figures."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datapipe.crystal import Crystal
from datapipe.schema import CrystalBatch
from datapipe.shards import Dataset
from trainer import jobs, plots
from trainer.baselines import baselines
from trainer.engine import Engine
from trainer.logger import read_metrics
from trainer.settings import FinetuneJob
from trainer.stages import FinetuneStage


def predictions(
    stage: FinetuneStage, batches: Iterator[CrystalBatch], device: torch.device
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(ids, labels [n, T], predictions [n, T]) in physical units, in evaluation mode."""
    stage.eval()
    ids: list[str] = []
    labels, outputs = [], []
    with torch.no_grad():
        for batch in batches:
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
    engine: Engine,
    dataset: Dataset,
    config: FinetuneJob,
    items: Mapping[str, np.ndarray],
    path: Path,
) -> dict[str, Any]:
    """Predicts validation and test split, writes CSVs and figures into the run directory, and
    returns the numbers for metrics.json: per target and split, beside composition-only
    baselines."""
    stage = engine.stage
    assert isinstance(stage, FinetuneStage)
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
            config.loader,
            engine.world,
            seed=config.seed,
            batch_size=config.finetune.batch_size,
            select=items[split],
        )
        ids, label, prediction = predictions(stage, iter(stream), engine.world.device)
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
    if len(items["test"]):
        out["baselines"] = {n: _baselines(dataset, n, items) for n in config.targets}
    plots.learning_curves(read_metrics(path, "finetune"), path / "learning_curves.png")
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
    label: np.ndarray | None,
    prediction: np.ndarray,
) -> None:
    """A CSV `id,target,prediction` (with several targets `target_<name>,prediction_<name>`), in
    one step; labels that are missing stay empty, and without labels the column is left out."""
    single = len(targets) == 1
    names = [""] if single else [f"_{n}" for n in targets]
    header = ["id"]
    for name in names:
        header += [f"target{name}"] * (label is not None) + [f"prediction{name}"]
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row, id in enumerate(ids):
            cells: list[str] = [id]
            for column in range(len(names)):
                if label is not None:
                    value = label[row, column]
                    cells.append("" if np.isnan(value) else f"{value:.7g}")
                cells.append(f"{prediction[row, column]:.7g}")
            writer.writerow(cells)
    os.replace(temporary, path)


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
