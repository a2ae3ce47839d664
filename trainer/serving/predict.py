"""Predictions for a file of crystals, as a CSV file."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.sources import Failure
from crysforge.trainer.serving.trained_on import Outsiders

if TYPE_CHECKING:
    from crysforge.trainer.serving.ensemble import Ensemble
    from crysforge.trainer.serving.predictor import Predictor
from crysforge.trainer.jobs.finetuning import Predicted
from crysforge.trainer.jobs.tables import _cell, _replacing


def predict_to_csv(
    model: Predictor | Ensemble,
    crystals: Iterable[Crystal | Failure],
    output: Path,
    max_atoms: int,
    strict: bool = False,
) -> Predicted:
    """Writes predictions as they come, and beside them the crystals that could not be used, or are
    not to be as they are unlike those that the model learned from (`strict`). The files appear when
    all are written; of predictions none does where there is none."""
    counts = Predicted(Outsiders(model.trained_on))
    with _replacing(dropped_path(output)) as bad, contextlib.suppress(_NothingWritten):
        drops = csv.writer(bad)
        drops.writerow(["id", "where", "reason", "message"])

        def usable() -> Iterator[Crystal]:
            for item in crystals:
                why = counts.outsiders.note(item) if isinstance(item, Crystal) else []
                if isinstance(item, Crystal) and not (why and strict):
                    yield item
                    continue
                counts.dropped += 1
                if isinstance(item, Crystal):
                    drops.writerow([item.id, "", "outside the training data", "; ".join(why)])
                else:
                    drops.writerow([item.id, item.where, item.reason, item.message])

        with _replacing(output) as file:
            writer = csv.writer(file)
            writer.writerow(["id", *model.columns])
            for crystal, values in model.iterate(usable(), max_atoms):
                writer.writerow([crystal.id, *(_cell(v) for v in values)])
                counts.written += 1
            if not counts.written:
                raise _NothingWritten
    if not counts.dropped:
        dropped_path(output).unlink()
    return counts


class _NothingWritten(Exception):
    """Keeps a file without a prediction from taking its place."""


def dropped_path(output: Path) -> Path:
    """Where the crystals are listed that have no prediction."""
    return output.with_name(f"{output.stem}.dropped.csv")
