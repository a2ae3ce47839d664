"""What a model is asked about: structures in any form, in the cell that it learned from."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.crystals.cells import PRIMITIVE, RULES, Cells
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.sources import Failure, Reading, read_crystals
from crysforge.datapipe.sources.folder import is_structure
from crysforge.datapipe.sources.objects import TAKEN, as_raw, is_structure_object
from crysforge.datapipe.sources.options import ReadingConfig
from crysforge.trainer.runs.trained_on import Outsiders, TrainedOn


@dataclass(kw_only=True)
class PredictReading(ReadingConfig):
    """Settings of reading for a model."""

    cell: str = "model"
    """The cell that crystals are brought to: model (as those that it was trained on), primitive,
    niggli, as_is. A model that was trained before cells were recorded takes them as they are."""

    CELLS: ClassVar[tuple[str, ...]] = ("model", *RULES)

    def cells_for(self, trained_on: TrainedOn) -> Cells:
        """The cell that is asked for."""
        if self.cell == "model":
            return trained_on.cells
        return self.cell_rule

    def reading_for(self, trained_on: TrainedOn) -> Reading:
        """What is done to each record."""
        return self.reading(cells=self.cells_for(trained_on))

    def remark(self, trained_on: TrainedOn) -> str:
        """What a user should know of the cell; empty where every cell of a material gives the same
        number."""
        cells = self.cells_for(trained_on)
        if cells.rule != trained_on.cells.rule:
            return f"cells are {cells}, but the model was trained on {trained_on.cells}"
        if cells.rule != PRIMITIVE:
            return (
                f"the model was trained on cells that are {cells}, and so are these: a material in "
                "another cell may get another number"
            )
        return ""

    def read(self, trained_on: TrainedOn) -> Iterator[Crystal | Failure]:
        """The crystals of `input`, or what is wrong with them.

        Raises:
            ValueError: a bad crystal with `on_bad=error`.
        """
        for item in read_crystals(
            self.input,
            self.format,
            options=self.options(),
            reading=self.reading_for(trained_on),
            workers=self.workers,
            progress=self.progress,
        ):
            if isinstance(item, Failure) and item.bad and self.on_bad == "error":
                raise ValueError(f"{item}; mend it, or give on_bad=drop to leave it out")
            yield item


def crystals_of(
    structures: Any, trained_on: TrainedOn, strict: bool = False, options: Mapping[str, Any] = {}
) -> tuple[list[Crystal], bool]:
    """Anything that `predict` takes as crystals in the model's cell, and whether it was one
    structure. Warns, once, of crystals unlike those that the model learned from.

    Args:
        structures: one structure or an iterable of them; see `objects.TAKEN`. A path by itself may
            hold many; among others, each must hold one.
        strict: whether such crystals are refused.
        options: settings of `PredictReading`.

    Raises:
        BadCrystal: one cannot be used, as it would be refused in a file; names which.
        ValueError: an input that cannot be read, an unknown option.
    """
    config = configure(PredictReading, {"workers": 1, "progress": False, **options})
    if isinstance(structures, np.ndarray) and structures.ndim == 0:
        structures = structures.item()
    if remark := config.remark(trained_on):
        warnings.warn(remark, stacklevel=3)
    single, found = _found(structures, config, trained_on)
    crystals, outsiders = [], Outsiders(trained_on)
    for item in found:
        if isinstance(item, Failure):
            raise BadCrystal(f"{item.where}: {item.message}", item.reason)
        outsiders.note(item)
        crystals.append(item)
    if outsiders.count and strict:
        raise BadCrystal(str(outsiders), "outside the training data")
    if outsiders.count:
        warnings.warn(str(outsiders), stacklevel=3)
    return crystals, single and len(crystals) == 1


def _found(
    structures: Any, config: PredictReading, trained_on: TrainedOn
) -> tuple[bool, Iterator[Crystal | Failure]]:
    if _is_path(structures):
        path = Path(structures)
        found = dataclasses.replace(config, input=str(path)).read(trained_on)
        return path.is_file() and is_structure(path.name), found
    if is_structure_object(structures):
        return True, _each([structures], config, trained_on)
    if hasattr(structures, "columns"):
        raise BadCrystal("a DataFrame is no list of structures: give the column that holds them")
    if not isinstance(structures, Iterable):
        raise BadCrystal(f"{type(structures).__name__} is no structure: give {TAKEN}")
    return False, _each(structures, config, trained_on)


def _each(
    structures: Iterable[Any], config: PredictReading, trained_on: TrainedOn
) -> Iterator[Crystal | Failure]:
    reading = config.reading_for(trained_on)
    for number, item in enumerate(structures):
        if not _is_path(item):
            yield reading(as_raw(item, number))
            continue
        inside = list(dataclasses.replace(config, input=str(item)).read(trained_on))
        if len(inside) != 1:
            raise BadCrystal(
                f"structure {number}: {item} holds {len(inside)} crystals: give its path by itself"
            )
        yield inside[0]


def _is_path(item: Any) -> bool:
    return isinstance(item, Path) or (isinstance(item, str) and "\n" not in item)
