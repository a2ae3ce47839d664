"""Predictions for a file of crystals, as a CSV file."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.sources import Failure

if TYPE_CHECKING:
    from crysforge.trainer.serving.ensemble import Ensemble
    from crysforge.trainer.serving.predictor import Predictor
from crysforge.trainer.jobs.tables import _cell, _replacing


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
                if isinstance(values, BadCrystal):
                    counts["dropped"] += 1
                    drops.writerow([crystal.id, "graph", values.reason, values])
                    continue
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
