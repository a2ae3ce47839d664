"""What a model reaches that sees the composition only: the mean and a ridge regression."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crysforge.datapipe.schema import MAX_Z

Part = tuple[Sequence[np.ndarray], np.ndarray]
"""Atomic numbers of each crystal, and its label in physical units (NaN: missing)."""

PENALTIES = tuple(10.0**k for k in range(-6, 3))
"""Ridge penalties to choose from."""


def composition_features(numbers: Sequence[np.ndarray]) -> np.ndarray:
    """Share of each element among the atoms of each crystal, [B, 118]; column Z - 1 is element Z.

    Args:
        numbers: atomic numbers 1..118 of each crystal's atoms.
    """
    counts = [np.bincount(np.asarray(z, dtype=np.int64), minlength=MAX_Z + 1)[1:] for z in numbers]
    features = np.array(counts, dtype=np.float64).reshape(-1, MAX_Z)
    return features / features.sum(1, keepdims=True)


def ridge(features: np.ndarray, labels: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Weights [F] and intercept that minimise mean squared error + penalty · |weights|².

    The intercept is free, so that standardised labels would give the same predictions.

    Args:
        features: [B, F]. labels: [B]. penalty: positive.
    """
    center, mean = features.mean(0), labels.mean()
    x, y = features - center, labels - mean
    gram = x.T @ x / len(x) + penalty * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ y / len(x))
    return weights, float(mean - center @ weights)


def baselines(train: Part, val: Part, test: Part) -> dict[str, float]:
    """Test MAE, in the labels' unit, of two predictors fitted on the training labels.

    `mean` predicts the mean training label. `ridge` is a linear regression on element fractions
    whose penalty has the lowest validation MAE (training MAE where validation has no labels).

    Raises:
        ValueError: no label in the training or test part, or lengths that differ.
    """
    (x, y), (x_val, y_val), (x_test, y_test) = (
        _labelled(part, name)
        for part, name in ((train, "training"), (val, "validation"), (test, "test"))
    )
    for labels, name in ((y, "training"), (y_test, "test")):
        if len(labels) == 0:
            raise ValueError(f"the {name} part has no labels to compute baselines from")
    chosen_on = (x_val, y_val) if len(y_val) else (x, y)
    fits = [ridge(x, y, penalty) for penalty in PENALTIES]
    best = min(fits, key=lambda fit: _mae(chosen_on[0] @ fit[0] + fit[1], chosen_on[1]))
    return {
        "mean": _mae(np.full_like(y_test, y.mean()), y_test),
        "ridge": _mae(x_test @ best[0] + best[1], y_test),
    }


def _labelled(part: Part, name: str) -> tuple[np.ndarray, np.ndarray]:
    numbers, labels = part[0], np.asarray(part[1], dtype=np.float64)
    if len(numbers) != len(labels):
        raise ValueError(f"{len(numbers)} crystals and {len(labels)} labels in the {name} part")
    present = np.isfinite(labels)
    return composition_features([z for z, p in zip(numbers, present, strict=True) if p]), labels[
        present
    ]


def _mae(prediction: np.ndarray, label: np.ndarray) -> float:
    return float(np.abs(prediction - label).mean())
