"""What the runs of a suite have found: scores, predictions of every crystal, or why there are none.

A run that predicts several targets is several results, told apart by the factor `target`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.datapipe.common.tables import number, read_rows
from crysforge.trainer.evaluation.suite import TARGET, Suite, SuiteRun
from crysforge.trainer.jobs.tables import classification_scores
from crysforge.trainer.runs.forms import HEARTBEAT, METRICS, RUN


@dataclass(frozen=True)
class Missing:
    """A run without a result."""

    run: SuiteRun
    reason: str
    values: Mapping[str, Any]
    """As of a result."""


@dataclass(frozen=True)
class Predictions:
    """Labelled crystals of a split: ids, labels [n] and predictions [n] in physical units."""

    ids: list[str]
    label: np.ndarray
    prediction: np.ndarray

    @cached_property
    def error(self) -> np.ndarray:
        """Absolute errors [n]."""
        return np.abs(self.prediction - self.label)

    @cached_property
    def error_of(self) -> dict[str, float]:
        """Absolute error by crystal."""
        return dict(zip(self.ids, self.error.tolist(), strict=True))


@dataclass(frozen=True)
class Result:
    """What one finished run found for one target."""

    run: SuiteRun
    values: Mapping[str, Any]
    """Value of each factor."""
    target: str
    """The label's name in the data set."""
    unit: str
    encoder: str
    labels: int
    """Training crystals with a label."""
    data: str
    """Where the run says that the data set was."""
    fingerprint: str
    """Identifies the data set."""
    scores: Mapping[str, float]
    """`mae`, `rmse`, `r2`, … of the evaluated split, in physical units, and `val_mae`."""
    composition: Mapping[str, float]
    """MAE of predictors that see the composition only."""
    seconds: float
    predictions: Predictions


def gather(suite: Suite, split: str = "test") -> tuple[list[Result], list[Missing]]:
    """Results of all finetunings, and those that have none with the reason."""
    results: list[Result] = []
    reasons: list[tuple[SuiteRun, str]] = []
    for run in suite.evaluated:
        try:
            results += _results(run, split)
        except (ValueError, OSError) as error:
            reasons.append((run, str(error)))
    several = list(dict.fromkeys(r.target for r in results if TARGET not in r.run.values))
    several = several if any(TARGET in r.values for r in results) else []
    missing = [
        Missing(run, reason, {**run.values, **extra})
        for run, reason in reasons
        for extra in ([{TARGET: t} for t in several if TARGET not in run.values] or [{}])
    ]
    return results, missing


def _results(run: SuiteRun, split: str) -> list[Result]:
    """Raises ValueError with the reason why a run has no results."""
    path = run.path
    if not (path / "run.json").is_file():
        raise ValueError("not started" if not path.is_dir() else "no run.json")
    if "finetune" not in read_mapping(path / "run.json", RUN).get("finished", []):
        raise ValueError(_progress(path))
    metrics = read_mapping(path / "metrics.json", METRICS)
    if split not in metrics:
        raise ValueError(f"its data has no {split} split")
    data = read_mapping(path / "config.yaml").get("data")
    found = []
    try:
        several = len(metrics["targets"]) > 1
        for name in metrics["targets"]:
            scores = metrics[split][name] if several else metrics[split]
            val = metrics.get("val", {})
            val = val.get(name, {}) if several else val
            predictions = _read_predictions(
                path / f"predictions_{split}.csv", f"_{name}" if several else ""
            )
            found.append(
                Result(
                    run=run,
                    values={**run.values, **({TARGET: name} if several else {})},
                    target=name,
                    unit=metrics["units"][name],
                    encoder=metrics["encoder"],
                    labels=metrics["labels"],
                    data=data if isinstance(data, str) else "",
                    fingerprint=metrics["data"],
                    scores={**scores, "val_mae": val.get("mae", math.nan)}
                    | classification_scores(predictions.label, predictions.prediction),
                    composition=metrics.get("baselines", {}).get(name, {}),
                    seconds=metrics.get("seconds", math.nan),
                    predictions=predictions,
                )
            )
            if abs(predictions.error.mean() - scores["mae"]) > 1e-3 * abs(scores["mae"]) + 1e-9:
                raise ValueError(
                    f"predictions_{split}.csv gives an MAE of {predictions.error.mean():.4g}, "
                    f"metrics.json {scores['mae']:.4g}: they are of different runs"
                )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"metrics.json is not a finetuning's: {error!r}") from None
    return found


def _progress(run: Path) -> str:
    """How far an unfinished run got, by its heartbeat."""
    try:
        beat = read_mapping(run / "heartbeat.json", HEARTBEAT)
    except ValueError:
        return "not finished"
    return f"not finished: {beat['status']} at step {beat['step']} of {beat['total']}"


def _read_predictions(path: Path, suffix: str) -> Predictions:
    """The labelled rows of a predictions CSV; see `trainer.jobs.tables.write_predictions`."""
    columns = ("id", f"target{suffix}", f"prediction{suffix}")
    try:
        rows = [[row[c] for c in columns] for row in read_rows(path)]
    except KeyError as error:
        raise ValueError(f"{path.name} cannot be read: it has no column {error}") from None
    known = [row for row in rows if row[1] != ""]
    label, prediction = (np.array([number(row[i], path) for row in known]) for i in (1, 2))
    if len(known) == 0 or not (np.isfinite(label).all() and np.isfinite(prediction).all()):
        raise ValueError(f"{path.name} has no labelled crystal or a prediction that is no number")
    return Predictions([row[0] for row in known], label, prediction)
