"""Tables of predictions and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crysforge.datapipe.common.files import replacing
from crysforge.datapipe.common.tables import row_writer

if TYPE_CHECKING:
    pass


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
    with replacing(path) as file:
        write = row_writer(file)
        write(["id", *columns])
        for id, *values in zip(ids, *columns.values(), strict=True):
            write([id, *map(cell, values)])


def suffixes(targets: Sequence[str]) -> list[str]:
    """What column names of each target end with: nothing where there is one."""
    return [""] if len(targets) == 1 else [f"_{name}" for name in targets]


def cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.7g}"


def classification_scores(label: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 (both at a threshold of 0.5) and area under the ROC curve of predictions of a
    yes-or-no label; empty if the labels [n] are anything but zeros and ones, both present."""
    if set(np.unique(label).tolist()) != {0.0, 1.0}:
        return {}
    positive, yes = label == 1, score >= 0.5
    hits = int((positive & yes).sum())
    order, ranks = np.unique(score, return_inverse=True)
    counts = np.bincount(ranks, minlength=len(order))
    rank = (np.cumsum(counts) - (counts - 1) / 2)[ranks]  # ties share their mean rank
    n, p = len(label), int(positive.sum())
    return {
        "accuracy": float((positive == yes).mean()),
        "f1": 2 * hits / (p + int(yes.sum())),
        "roc_auc": (float(rank[positive].sum()) - p * (p + 1) / 2) / (p * (n - p)),
    }
