"""Predictions for a file of crystals, as a CSV file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from crysforge.datapipe.common.files import replacing
from crysforge.datapipe.common.places import is_stream
from crysforge.datapipe.common.tables import row_writer
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.sources import Failure
from crysforge.trainer.jobs.finetuning import Predicted
from crysforge.trainer.jobs.tables import cell
from crysforge.trainer.runs.trained_on import Outsiders
from crysforge.trainer.serving.request import keep_request

if TYPE_CHECKING:
    from crysforge.trainer.serving.ensemble import Ensemble
    from crysforge.trainer.serving.predictor import Predictor


def predict_to_csv(
    model: Predictor | Ensemble,
    crystals: Iterable[Crystal | Failure],
    output: Path,
    max_atoms: int,
    strict: bool = False,
    request: str = "",
) -> Predicted:
    """Writes predictions as they come, and beside them the crystals that could not be used, or are
    not to be as they are unlike those that the model learned from (`strict`). The files appear when
    all are written, the predictions last; where there is none they do not appear. A pipe or
    terminal gets them as they come, and standard error the crystals that could not be used.

    Args:
        request: what is asked for; it is kept beside the output, see `trainer.serving.request`.
    """
    counts = Predicted(Outsiders(model.trained_on))
    output.parent.mkdir(parents=True, exist_ok=True)
    with suppress(_NothingWritten), replacing(output, streams=True) as file:
        hashed = _Hashed(file)
        with replacing(dropped_path(output), streams=True) as bad:
            _write(model, crystals, _Drops(bad), row_writer(hashed), max_atoms, strict, counts)
        if not counts.dropped and not is_stream(output):
            dropped_path(output).unlink()
        if not counts.written:
            raise _NothingWritten
        if request:
            told = {"written": counts.written, "dropped": counts.dropped}
            keep_request(output, request, hashed.digest.hexdigest(), told)
    return counts


def _write(
    model: Predictor | Ensemble,
    crystals: Iterable[Crystal | Failure],
    drop: _Drops,
    write: Callable[[Sequence[Any]], Any],
    max_atoms: int,
    strict: bool,
    counts: Predicted,
) -> None:
    """Writes a line for each crystal, here or there."""

    def usable() -> Iterator[Crystal]:
        for item in crystals:
            why = counts.outsiders.note(item) if isinstance(item, Crystal) else []
            if isinstance(item, Crystal) and not (why and strict):
                yield item
                continue
            counts.dropped += 1
            if isinstance(item, Crystal):
                drop([item.id, "", "outside the training data", "; ".join(why)])
            else:
                drop([item.id, item.where, item.reason, item.message])

    write(["id", *model.columns])
    for crystal, values in model.iterate(usable(), max_atoms):
        if isinstance(values, BadCrystal):
            counts.dropped += 1
            drop([crystal.id, "graph", values.reason, str(values)])
        else:
            counts.written += 1
            write([crystal.id, *(cell(v) for v in values)])


class _Hashed:
    """Writes to a file of UTF-8 text, and knows the hash of what it wrote."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, text: str) -> int:
        self.digest.update(text.encode())
        return self._file.write(text)


class _Drops:
    """The list of crystals without a prediction; its head comes with the first."""

    def __init__(self, file: IO[str]) -> None:
        self._write, self._empty = row_writer(file), True

    def __call__(self, row: Sequence[str]) -> None:
        if self._empty:
            self._write(["id", "where", "reason", "message"])
        self._empty = False
        self._write(row)


class _NothingWritten(Exception):
    """Keeps a file without a prediction from taking its place."""


def dropped_path(output: Path) -> Path:
    """Where the crystals are listed that have no prediction."""
    if is_stream(output):
        return Path("/dev/stderr")
    return output.with_name(f"{output.stem}.dropped.csv")
