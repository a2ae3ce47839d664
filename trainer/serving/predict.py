"""Predictions for a file of crystals, as a CSV file."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.sources import Failure
from crysforge.trainer.serving.request import keep_request

if TYPE_CHECKING:
    from crysforge.trainer.serving.ensemble import Ensemble
    from crysforge.trainer.serving.predictor import Predictor
from crysforge.trainer.jobs.tables import _cell, _replacing


def predict_to_csv(
    model: Predictor | Ensemble,
    crystals: Iterable[Crystal | Failure],
    output: Path,
    max_atoms: int,
    request: str = "",
) -> tuple[int, int]:
    """Writes predictions as they come, and beside them the crystals that could not be used;
    returns how many of each. The files appear when all are written, the predictions last; where
    there is none they do not appear.

    Args:
        request: what is asked for; it is kept beside the output, see `trainer.serving.request`.
    """
    counts = {"written": 0, "dropped": 0}
    with contextlib.suppress(_NothingWritten), _replacing(output) as file:
        with _replacing(dropped_path(output)) as bad:
            drops = csv.writer(bad)
            drops.writerow(["id", "where", "reason", "message"])

            def usable() -> Iterator[Crystal]:
                for item in crystals:
                    if isinstance(item, Crystal):
                        yield item
                    else:
                        counts["dropped"] += 1
                        drops.writerow([item.id, item.where, item.reason, item.message])

            writer = csv.writer(file)
            writer.writerow(["id", *model.columns])
            for crystal, values in model.iterate(usable(), max_atoms):
                if isinstance(values, BadCrystal):
                    counts["dropped"] += 1
                    drops.writerow([crystal.id, "graph", values.reason, values])
                else:
                    counts["written"] += 1
                    writer.writerow([crystal.id, *(_cell(v) for v in values)])
        if not counts["dropped"]:
            dropped_path(output).unlink()
        if not counts["written"]:
            raise _NothingWritten
        file.flush()
        if request:
            keep_request(output, request, Path(file.name), counts)
    return counts["written"], counts["dropped"]


class _NothingWritten(Exception):
    """Keeps a file without a prediction from taking its place."""


def dropped_path(output: Path) -> Path:
    """Where the crystals are listed that have no prediction."""
    return output.with_name(f"{output.stem}.dropped.csv")
