"""What a model's config says of the crystals it learned from, and how far others are from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ase.data import chemical_symbols

from crysforge.datapipe.crystals.cells import AS_GIVEN, Cells
from crysforge.datapipe.crystals.crystal import Crystal

_SHOWN = 5
"""Crystals that are named."""
_SLACK = 0.05
"""Share of a volume that is no difference: the extremes of a small set are chance."""


@dataclass(frozen=True)
class TrainedOn:
    """The `data` section of a model's config, as far as predictions need it.

    Attributes:
        cells: the cell that its crystals were in; `as_is` where the config does not say.
        extensive: targets that go with the number of atoms in the cell.
        elements: atomic numbers that occurred; empty: unknown.
        atoms: least and most atoms in a cell; None: unknown.
        volume: least and most volume in Å³ per atom; None: unknown.
    """

    cells: Cells = AS_GIVEN
    extensive: tuple[str, ...] = ()
    elements: frozenset[int] = frozenset()
    atoms: tuple[float, float] | None = None
    volume: tuple[float, float] | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str) -> TrainedOn:
        """From the section. Raises ValueError, naming `where` it stands, if it is damaged."""
        try:
            seen = data.get("seen") or {}
            return cls(
                Cells.recorded(data.get("cell")),
                tuple(_of(str, data.get("extensive") or [])),
                frozenset(_of(int, seen.get("elements", data.get("elements")) or [])),
                _range(seen.get("atoms")),
                _range(seen.get("volume_per_atom")),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where} is damaged: section data: {error}") from None

    def outside(self, crystal: Crystal) -> list[str]:
        """In what a crystal is unlike all that the model learned from, in words."""
        out = []
        new = set(crystal.numbers.tolist()) - self.elements if self.elements else ()
        if new:
            names = ", ".join(chemical_symbols[z] for z in sorted(new))
            out.append(f"element{'s' * (len(new) > 1)} {names}")
        for bounds, slack, value, unit in (
            (self.atoms, 0.0, float(len(crystal)), "atoms"),
            (self.volume, _SLACK, crystal.volume / len(crystal), "Å³ per atom"),
        ):
            if bounds and not bounds[0] * (1 - slack) <= value <= bounds[1] * (1 + slack):
                out.append(f"{value:.4g} {unit} ({bounds[0]:.4g} to {bounds[1]:.4g})")
        return out


def _of(kind: type, values: Any) -> list[Any]:
    if not isinstance(values, list) or not all(type(v) is kind for v in values):
        raise ValueError(f"{str(values)[:80]} is no list of {kind.__name__}")
    return values


def _range(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(v, int | float) for v in value):
        raise ValueError(f"{str(value)[:80]} is no range")
    least, most = value
    return float(least), float(most)


@dataclass
class Outsiders:
    """Collects crystals unlike those that a model learned from, to be told of once."""

    trained_on: TrainedOn
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def note(self, crystal: Crystal) -> list[str]:
        """In what a crystal is outside, see `TrainedOn.outside`; remembered if in anything."""
        why = self.trained_on.outside(crystal)
        if why:
            self.count += 1
            if self.count <= _SHOWN:
                self.shown.append(f"{crystal.id} ({'; '.join(why)})")
        return why

    def __str__(self) -> str:
        """Empty if there are none."""
        if not self.count:
            return ""
        more = ", …" if self.count > len(self.shown) else ""
        what = "crystal is" if self.count == 1 else "crystals are"
        return f"{self.count} {what} unlike all that the model learned from: " + (
            ", ".join(self.shown) + more
        )
