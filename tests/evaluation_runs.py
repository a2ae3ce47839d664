"""Runs and suites to evaluate, as finetuning and pretraining leave them, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crysforge.datapipe.common.files import write_json, write_text
from crysforge.datapipe.storage.dataset import DatasetWriter
from crysforge.trainer.jobs.tables import errors, write_predictions
from tests.conftest import make_crystal


def dataset(root: Path, count: int = 40, size: int | None = None, first: int = 0) -> str:
    """A data set whose test split has `count` crystals, from number `first` on; returns its
    fingerprint."""
    rng = np.random.default_rng(0)
    with DatasetWriter(root, ["gap"], {"gap": "eV"}) as writer:
        for split, n in (("train", 4), ("val", 2), ("test", count)):
            for i in range(first, first + n):
                atoms = size or 1 + i % 12
                writer.add(split, make_crystal(rng, atoms, f"{split}-{i}", {"gap": rng.random()}))
        return writer.finish({}).fingerprint


def finetuned(
    path: Path,
    error: float,
    seed: int = 0,
    *,
    targets: Sequence[str] = ("gap",),
    data: str = "data/demo",
    fingerprint: str = "f",
    labels: int = 100,
    count: int = 40,
    first: int = 0,
    encoder: str = "cgcnn",
    unit: str = "eV",
    binary: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A finished finetuning whose errors are about `error`, drawn with the seed."""
    rng = np.random.default_rng([seed, len(targets)])
    ids = [f"test-{i}" for i in range(first, first + count)]
    label = np.random.default_rng(1).normal(0, 1, (count, len(targets)))
    label = (label > 0).astype(float) if binary else label
    prediction = label + error * rng.choice([-1, 1], label.shape) * rng.uniform(
        0.5, 1.5, label.shape
    )
    path.mkdir(parents=True)
    write_predictions(path / "predictions_test.csv", list(targets), ids, label, prediction)
    scores = {t: errors(label[:, i], prediction[:, i]) for i, t in enumerate(targets)}
    shown = scores if len(targets) > 1 else scores[targets[0]]
    write_json(
        path / "metrics.json",
        {
            "targets": list(targets), "units": dict.fromkeys(targets, unit), "seed": seed,
            "labels": labels, "init_from": "none", "encoder": encoder, "data": fingerprint,
            "val": shown, "test": shown,
            "baselines": {t: {"mean": 0.8, "ridge": 0.6} for t in targets}, "seconds": 60.0,
        },
    )  # fmt: skip
    write_json(path / "run.json", {"identity": {}, "finished": ["finetune"]})
    settings = {"data": data, "seed": seed, "run_dir": str(path), "finetune": {"lr": 0.001}}
    write_text(path / "config.yaml", json.dumps({**settings, **(config or {})}))
    return path


def suite(
    root: Path, runs: Mapping[str, Mapping[str, Any]], factors: Sequence[str], **more
) -> Path:
    """suite.json over runs in `root` named like them; `job` and `path` may be among a run's
    values."""
    record = {"schema": 1, "title": "A suite", "baseline": "pretraining=none", "paper": None}
    record["factors"] = list(factors)
    record["runs"] = {
        name: {
            "path": values.get("path", name),
            "job": values.get("job", "finetune"),
            "values": {k: v for k, v in values.items() if k not in ("path", "job")},
        }
        for name, values in runs.items()
    }
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "suite.json", {**record, **more})
    return root


def arms_and_seeds(
    root: Path, arms: Mapping[str, float], seeds: Sequence[int] = (0, 1, 2), **run: Any
) -> Path:
    """A suite of arms told apart by `pretraining`, each with an error of its own."""
    runs = {}
    for arm, error in arms.items():
        for seed in seeds:
            name = f"{arm}-{seed}"
            finetuned(root / name, error * (1 + 0.02 * seed), seed, **run)
            runs[name] = {"pretraining": arm, "seed": seed}
    return suite(root, runs, ["pretraining", "seed"])
