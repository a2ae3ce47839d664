"""What a user may say of how crystals are read: the same settings for `prepare` and `predict`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from crysforge.datapipe.cif import CHECKS
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.crystals.cells import RULES, Cells
from crysforge.datapipe.crystals.limits import Limits
from crysforge.datapipe.sources.base import Options
from crysforge.datapipe.sources.read import Reading


@dataclass(kw_only=True)
class ReadingConfig:
    """Settings of everything that reads crystals. One that is added here is one of all of them."""

    input: str = ""
    """File, archive, folder or data set with the crystals; or "prototypes" (synthetic)."""
    format: str = "auto"
    """Reader or data set by name; "auto" chooses by what is in the input."""
    id_column: str | None = None
    """Column or field of the id, that of a table of labels too; None guesses."""
    structure_column: str | None = None
    """Column or field of the structure; None guesses."""
    follow_links: bool = False
    """Whether to read files outside of the input, where links in it or paths in a table lead."""
    checks: str = "strict"
    """What to do with a CIF whose atoms contradict its formula, Z, density, volume or symbol:
    strict refuses it; warn reads it by its operations and lists it in warnings.csv."""
    cell: str = "primitive"
    """The cell that crystals are brought to: primitive (one number for one material, whatever its
    cell), niggli (as many atoms as there are, in Niggli's basis), as_is."""
    cell_tolerance: float = 0.01
    """Distance in Å that an atom may be moved by where a cell is reduced to a primitive one."""
    limits: Limits = field(default_factory=Limits)
    """What one crystal may cost while it is read."""
    size: int = 2000
    """Number of crystals with input=prototypes."""
    on_bad: str = "drop"
    """drop: leave bad crystals out and list them; error: stop at the first."""
    workers: int = 0
    """Processes that parse; 0: one for each core."""
    progress: bool = True
    """Whether to show progress bars."""

    CELLS: ClassVar[tuple[str, ...]] = RULES
    """What `cell` may be."""

    def __post_init__(self) -> None:
        if self.cell not in self.CELLS:
            raise ValueError(f"unknown cell {self.cell!r}: {nearest(self.cell, self.CELLS)}")
        Cells(tolerance=self.cell_tolerance)
        if self.checks not in CHECKS:
            raise ValueError(f"checks must be {' or '.join(CHECKS)}, got {self.checks!r}")
        if self.on_bad not in ("drop", "error"):
            raise ValueError(f"on_bad must be drop or error, got {self.on_bad!r}")
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    @property
    def cell_rule(self) -> Cells:
        """What `cell` asks for."""
        return Cells(rule=self.cell, tolerance=self.cell_tolerance)

    def options(self, **more: Any) -> Options:
        """What a reader is told: those of these settings that are one of its `Options`, and more
        of them."""
        return Options(**self._among(Options) | more)

    def reading(
        self, labels: tuple[str, ...] = (), cells: Cells | None = None, **more: Any
    ) -> Reading:
        """What is done to each record: those of these settings that are one of `Reading`, and more
        of them."""
        given = {"labels": labels, "cells": cells or self.cell_rule, **more}
        return Reading(**self._among(Reading) | given)

    def _among(self, kind: Any) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(kind) if hasattr(self, f.name)}
