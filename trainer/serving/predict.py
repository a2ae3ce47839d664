"""Predictions for a file of crystals, as a CSV file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from crysforge.datapipe.common.files import replacing
from crysforge.datapipe.common.streams import is_stream
from crysforge.datapipe.common.tables import row_writer
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.sources import Failure
from crysforge.trainer.jobs.tables import cell

if TYPE_CHECKING:
    from crysforge.trainer.serving.ensemble import Ensemble
    from crysforge.trainer.serving.predictor import Predictor


def predict_to_csv(
    model: Predictor | Ensemble, crystals: Iterable[Crystal | Failure], output: Path, max_atoms: int
) -> tuple[int, int]:
    """Writes predictions as they come, and beside them the crystals that could not be used;
    returns how many of each. The files appear when all are written; of predictions none does where
    there is none. A pipe or terminal gets them as they come, and standard error the crystals that
    could not be used."""
    counts = {"written": 0, "dropped": 0}
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(dropped_path(output), streams=True) as bad, suppress(_NothingWritten):
        drop = row_writer(bad)

        def usable() -> Iterator[Crystal]:
            for item in crystals:
                if isinstance(item, Crystal):
                    yield item
                else:
                    if not counts["dropped"]:
                        drop(["id", "where", "reason", "message"])
                    counts["dropped"] += 1
                    drop([item.id, item.where, item.reason, item.message])

        with replacing(output, streams=True) as file:
            write = row_writer(file)
            write(["id", *model.columns])
            for crystal, values in model.iterate(usable(), max_atoms):
                write([crystal.id, *(cell(v) for v in values)])
                counts["written"] += 1
            if not counts["written"]:
                raise _NothingWritten
    if not counts["dropped"] and not is_stream(output):
        dropped_path(output).unlink()
    return counts["written"], counts["dropped"]


class _NothingWritten(Exception):
    """Keeps a file without a prediction from taking its place."""


def dropped_path(output: Path) -> Path:
    """Where the crystals are listed that have no prediction."""
    if is_stream(output):
        return Path("/dev/stderr")
    return output.with_name(f"{output.stem}.dropped.csv")
