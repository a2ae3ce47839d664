"""Which cell a crystal is described in. A material has many; a model should see one of them.

A cell that holds the crystal several times is cut down to one copy, in Niggli's basis: see
`translations` and `bases`. Atoms move by no more than the tolerance, to the mean of their copies;
lattice and symmetry stay what they are, since nothing else is rounded or idealised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from crysforge.datapipe.crystals.bases import standard_basis
from crysforge.datapipe.crystals.crystal import Crystal, in_standard_orientation, wrap
from crysforge.datapipe.crystals.translations import translations

PRIMITIVE, NIGGLI, AS_IS = RULES = ("primitive", "niggli", "as_is")
"""The primitive cell in its standard basis; the cell as it is given in its standard basis; the cell
as it is given."""

MOST = 0.25
"""Å: largest tolerance; beyond it, structures that differ would become one."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Brings crystals to the cell that is asked for."""

    rule: str = PRIMITIVE
    """One of `RULES`."""
    tolerance: float = 0.01
    """Å that an atom of a primitive cell may be away from any of its copies' places."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"cell must be one of {', '.join(RULES)}, got {self.rule!r}")
        if not 0 < self.tolerance <= MOST:
            raise ValueError(
                f"cell_tolerance is a distance in Å above 0 and up to {MOST}, got {self.tolerance}"
            )

    def __call__(self, crystal: Crystal) -> Crystal:
        """The crystal in the cell. A crystal whose cell is that already is returned as it is."""
        if self.rule == AS_IS:
            return crystal
        copy = _one_copy(crystal, self.tolerance) if self.rule == PRIMITIVE else crystal
        return in_basis(copy, standard_basis(copy), anew=copy is not crystal)

    def describe(self) -> dict[str, Any]:
        """For a manifest."""
        return {"rule": self.rule} if self.rule != PRIMITIVE else asdict(self)

    @classmethod
    def recorded(cls, value: Any) -> Cells:
        """From what `describe` gave; `as_is` where nothing is recorded, as before there was a
        choice.

        Raises:
            ValueError: it is no such record.
        """
        if value is None:
            return cls(rule=AS_IS)
        tolerance = value.get("tolerance", cls.tolerance) if isinstance(value, Mapping) else None
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
            raise ValueError(f"no record of a cell: {str(value)[:80]}")
        return cls(rule=value.get("rule"), tolerance=float(tolerance))

    def __str__(self) -> str:
        return f"{self.rule} ({self.tolerance:g} Å)" if self.rule == PRIMITIVE else self.rule


AS_GIVEN = Cells(rule=AS_IS)
"""Leaves every crystal as it is."""


def _one_copy(crystal: Crystal, tolerance: float) -> Crystal:
    """One of the copies that the cell holds, with the mean of their coordinates; neither wrapped
    nor turned. The crystal itself where there is one."""
    found = translations(crystal, tolerance)
    if len(found) == 1:
        return crystal
    basis = found.basis()
    return replace(
        crystal,
        numbers=crystal.numbers[found.atoms],
        frac_coords=found.places @ np.linalg.inv(basis),
        lattice=basis @ crystal.lattice,
        copies=crystal.copies * len(found),
    )


def in_basis(crystal: Crystal, basis: np.ndarray, anew: bool = False) -> Crystal:
    """The crystal with other lattice vectors, rows [3, 3] in its own with a positive determinant;
    itself where they are the same, unless it is to be wrapped and turned `anew`."""
    if (basis == np.eye(3)).all():
        if not anew:
            return crystal
        coords, lattice = crystal.frac_coords, crystal.lattice
    else:
        coords, lattice = crystal.frac_coords @ np.linalg.inv(basis), basis @ crystal.lattice
    return replace(crystal, frac_coords=wrap(coords), lattice=in_standard_orientation(lattice))


def cells_of(provenance: Mapping[str, Any]) -> Cells:
    """The rule that the crystals of a data set were brought to, by its manifest's provenance;
    `as_is` where sets with different rules were merged.

    Raises:
        ValueError: it is damaged.
    """
    found = [Cells.recorded(history.get("cell")) for history in _histories(provenance)]
    rules = {cells.rule for cells in found}
    if len(rules) != 1:
        return AS_GIVEN
    return max(found, key=lambda cells: cells.tolerance)


def extensive_of(provenance: Mapping[str, Any]) -> list[str]:
    """Labels of a data set that go with the number of atoms in the cell."""
    lists = (history.get("extensive") for history in _histories(provenance))
    return list(dict.fromkeys(str(name) for names in lists for name in _items(names)))


def _histories(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The provenances of the data sets that `prepare` made and this one was made of."""
    sources = _items(provenance.get("sources")) if "action" in provenance else []
    inner = [s["provenance"] for s in sources if isinstance(s, Mapping) and "provenance" in s]
    if not inner:
        yield provenance
    for one in inner:
        yield from _histories(one if isinstance(one, Mapping) else {})


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
