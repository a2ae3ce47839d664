"""Several finetuned models as one, whose disagreement says how far a prediction can be trusted.

An ensemble is a directory with a model of its own for each member (0, 1, …) and, written last,
ensemble.json. The uncertainty is the members' standard deviation times a scale for each target,
which makes the validation errors as large as they are said to be: in the root mean square.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crysforge.datapipe.common.files import new_directory, write_json
from crysforge.datapipe.common.places import inside
from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.datapipe.common.tables import number, read_rows
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS
from crysforge.trainer.figures import plots
from crysforge.trainer.jobs.finetuning import file_suffixes
from crysforge.trainer.jobs.tables import errors, suffixes, write_table
from crysforge.trainer.runs.card import share
from crysforge.trainer.runs.forms import ENSEMBLE as FORM
from crysforge.trainer.runs.model_directory import open_model
from crysforge.trainer.runs.trained_on import TrainedOn
from crysforge.trainer.serving.inputs import crystals_of
from crysforge.trainer.serving.predictor import Predictor

ENSEMBLE = "ensemble.json"
SCHEMA = 1
_COLUMNS = ("prediction", "uncertainty")
LEVELS = np.linspace(0.05, 0.95, 19)
"""Shares of the labels that intervals around the predictions are to hold."""


@dataclass
class MemberPredictions:
    """What the members say of a split.

    Attributes:
        ids: of its crystals.
        labels: [n, T], NaN where missing.
        members: [M, n, T].
    """

    ids: list[str]
    labels: np.ndarray
    members: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """[n, T]"""
        return self.members.mean(0)

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation over the members, [n, T]; never 0."""
        return np.maximum(self.members.std(0, ddof=1), np.finfo(np.float32).tiny)


def read_predictions(runs: Sequence[Path], split: str, targets: Sequence[str]) -> MemberPredictions:
    """Collects predictions_<split>.csv of the runs, crystal by crystal.

    Raises:
        ValueError: a run has none, or predicts other crystals or labels than the first.
    """
    ids: list[str] = []
    tables = []
    for run in runs:
        path = run / f"predictions_{split}.csv"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: {run} is no finished finetuning")
        columns = [f"{kind}{s}" for kind in ("target", "prediction") for s in suffixes(targets)]
        table = list(read_rows(path))
        if not table or not {"id", *columns} <= table[0].keys():
            raise ValueError(f"{path} has no columns id, {', '.join(columns)}, or no rows")
        rows = {row["id"]: row for row in table}
        ids = ids or list(rows)
        if set(rows) != set(ids):
            raise ValueError(f"{path} is not of the crystals of {runs[0]}")
        tables.append([[number(rows[id][c], path) for c in columns] for id in ids])
    values = np.array(tables).reshape(len(runs), len(ids), 2, len(targets))
    if not np.allclose(values[:, :, 0], values[:1, :, 0], rtol=1e-6, equal_nan=True):
        raise ValueError(f"the {split} labels of {', '.join(map(str, runs))} are not the same")
    return MemberPredictions(ids, values[0, :, 0], values[:, :, 1])


def fit_scale(found: MemberPredictions) -> np.ndarray:
    """Factors [T] that give the members' spread the size of the errors, root mean square to root
    mean square. Not the maximum likelihood, a mean over ratios of the two: few members often agree
    by chance, and of two members the mean has no limit."""
    error = found.labels - found.mean
    spread = np.where(np.isnan(error), np.nan, found.spread)
    return np.sqrt(np.nanmean(error**2, axis=0) / np.nanmean(spread**2, axis=0))


def calibration(error: np.ndarray, uncertainty: np.ndarray) -> dict[str, Any]:
    """How well uncertainties fit errors, both [n] without gaps.

    Returns:
        `expected` and `observed`: shares of the errors within central intervals of a normal
        distribution; `area` between the two curves (0 is right, 0.5 the worst); `nll`, the mean
        negative log-likelihood; `rank_correlation` (Spearman) of absolute error and uncertainty.
    """
    from scipy import stats

    within = stats.norm.ppf(0.5 + LEVELS / 2)
    observed = np.array([(np.abs(error) <= w * uncertainty).mean() for w in within])
    around = np.concatenate([[0], np.abs(observed - LEVELS), [0]])
    steps = np.diff(LEVELS, prepend=0, append=1)
    rank = stats.spearmanr(np.abs(error), uncertainty).statistic if len(error) > 2 else math.nan
    return {
        "expected": LEVELS.tolist(),
        "observed": observed.tolist(),
        "area": float((steps * (around[1:] + around[:-1])).sum() / 2),
        "nll": float(-stats.norm.logpdf(error, scale=uncertainty).mean()),
        "rank_correlation": float(rank),
    }


def create(runs: Sequence[str], output: str | Path) -> dict[str, Any]:
    """Makes finished finetunings one ensemble: the directory appears when it is complete.

    Writes the members, predictions_val.csv and predictions_test.csv with an uncertainty for each
    prediction, metrics.json, and for each target of the test split calibration and parity as PNG.

    Raises:
        ValueError: fewer than two runs, runs that predict different things or were judged on
            different crystals, or an output that exists and is another.
    """
    if len(set(runs)) < 2 or len(set(runs)) < len(runs):
        raise ValueError(f"an ensemble needs two or more different runs, got {list(runs)}")
    members = [open_model(run) for run in runs]
    scalers = [m.scaler for m in members]
    first = scalers[0]
    for run, scaler in zip(runs, scalers, strict=True):
        if scaler is None:
            raise ValueError(f"{run} is a pretrained encoder, it predicts no property")
        if first is None or (scaler.targets, scaler.units) != (first.targets, first.units):
            raise ValueError(f"{run} predicts other targets than {runs[0]}")
    assert first is not None
    known = [TrainedOn.of(member.data, str(member.path)) for member in members]
    for run, one in zip(runs, known, strict=True):
        _check_cells(one, known[0], run)
    found = {s: read_predictions([Path(r) for r in runs], s, first.targets) for s in _splits(runs)}
    scale = fit_scale(found["val"])
    with new_directory(output, again=True) as work:
        for number, member in enumerate(members):
            share(member, work / str(number))
        metrics = _report(work, found, scale, first.targets, first.units)
        metrics |= {"members": list(map(str, runs))}
        write_json(work / "metrics.json", metrics)
        record = {"schema": SCHEMA, "members": len(members), "scale": scale.tolist()}
        write_json(work / ENSEMBLE, record)
    return metrics


def _check_cells(one: TrainedOn, other: TrainedOn, where: str) -> None:
    """Raises ValueError for members that see a material in different cells."""
    if (one.cells, set(one.extensive)) != (other.cells, set(other.extensive)):
        raise ValueError(
            f"{where}: members of an ensemble must be trained on one kind of cell, and here are "
            f"{one.cells} and {other.cells}: prepare their data with the same cell=…"
        )


def _splits(runs: Sequence[str]) -> list[str]:
    """Those that were predicted: `val`, which the scale needs, and `test` if there is one."""
    return ["val", *(["test"] if (Path(runs[0]) / "predictions_test.csv").is_file() else [])]


def _report(
    path: Path,
    found: dict[str, MemberPredictions],
    scale: np.ndarray,
    targets: Sequence[str],
    units: Sequence[str],
) -> dict[str, Any]:
    """Writes tables and figures; the numbers for metrics.json."""
    out: dict[str, Any] = {
        "targets": list(targets),
        "units": dict(zip(targets, units, strict=True)),
    }
    for split, given in found.items():
        mean, uncertainty = given.mean, scale * given.spread
        columns = {}
        scores = {}
        endings = zip(targets, suffixes(targets), file_suffixes(targets), strict=True)
        for i, (target, suffix, ending) in enumerate(endings):
            columns[f"target{suffix}"] = given.labels[:, i]
            columns[f"prediction{suffix}"] = mean[:, i]
            columns[f"uncertainty{suffix}"] = uncertainty[:, i]
            known = ~np.isnan(given.labels[:, i])
            label, guess, sigma = given.labels[known, i], mean[known, i], uncertainty[known, i]
            alone = [errors(label, member[known, i])["mae"] for member in given.members]
            fit = calibration(guess - label, sigma)
            scores[target] = {**errors(label, guess), "members_mae": alone, "calibration": fit}
            plots.parity_plot(label, guess, target, units[i], path / f"parity_{split}{ending}.png")
            plots.calibration_plot(
                guess - label,
                sigma,
                fit,
                target,
                units[i],
                path / f"calibration_{split}{ending}.png",
            )
        write_table(path / f"predictions_{split}.csv", given.ids, columns)
        out[split] = scores[targets[0]] if len(targets) == 1 else scores
    return out


class Ensemble:
    """An ensemble as a Python object.

    Attributes:
        targets, units: what it predicts.
        columns: names of the numbers in a row of `iterate`.
        trained_on: what the first member's crystals were like.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device = "cpu",
        max_pairs: int = MAX_PAIRS,
    ) -> None:
        root = Path(path)
        record = read_mapping(root / ENSEMBLE, FORM, schema=SCHEMA)
        members = [inside(root, str(i)) for i in range(record["members"])]
        self.members = [Predictor(open_model(member), device, max_pairs) for member in members]
        self.targets, self.units = self.members[0].targets, self.members[0].units
        self.scale = np.array(record["scale"], dtype=float)
        if not self.targets or any(m.targets != self.targets for m in self.members):
            raise ValueError(f"the members of {root} do not predict the same")
        if self.scale.shape != (len(self.targets),):
            raise ValueError(f"{root / ENSEMBLE}: scale must be one positive number a target")
        self.trained_on = self.members[0].trained_on
        for member in self.members[1:]:
            _check_cells(member.trained_on, self.trained_on, str(root))
        self.columns = [f"{k}{s}" for s in suffixes(self.targets) for k in _COLUMNS]

    def require_head(self) -> None:
        """An ensemble always predicts."""

    def predict(
        self, structures: Any, max_atoms: int = 4096, *, strict: bool = False, **reading: Any
    ) -> np.ndarray:
        """Means over the members, as `Predictor.predict` gives them."""
        return self.predict_with_uncertainty(structures, max_atoms, strict=strict, **reading)[0]

    def predict_with_uncertainty(
        self, structures: Any, max_atoms: int = 4096, *, strict: bool = False, **reading: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Means over the members and their standard deviations to be expected of the errors, each
        shaped and in units as `Predictor.predict` says."""
        crystals, single = crystals_of(structures, self.trained_on, strict, reading)
        each = [[row for _, row in m.iterate(crystals, max_atoms)] for m in self.members]
        values = np.array(each).reshape(len(self.members), len(crystals), len(self.targets))
        both = [values.mean(0), self.scale * values.std(0, ddof=1)]
        both = [v[:, 0] if len(self.targets) == 1 else v for v in both]
        mean, sigma = [v[0] if single else v for v in both]
        return mean, sigma

    def iterate(
        self, crystals: Iterable[Crystal], max_atoms: int = 4096
    ) -> Iterator[tuple[Crystal, np.ndarray | BadCrystal]]:
        """Crystals with prediction and uncertainty of each target, [2 T] as in `columns`, or why
        there is none."""
        streams = itertools.tee(crystals, len(self.members))
        each = (m.iterate(s, max_atoms) for m, s in zip(self.members, streams, strict=True))
        for rows in zip(*each, strict=True):
            found = [row for _, row in rows]
            if bad := next((row for row in found if isinstance(row, BadCrystal)), None):
                yield rows[0][0], bad
                continue
            values = np.stack(found)
            both = np.stack([values.mean(0), self.scale * values.std(0, ddof=1)], axis=1)
            yield rows[0][0], both.reshape(-1)
