"""Collects public properties of the elements: makes the table that element_features.py bins.

    python -m crysforge.datapipe.crystals.elements > models/objectives/elements.json

Electronegativity (Pauling), first ionisation energy, electron affinity and molar volume are those
that pymatgen ships, covalent radii (Cordero et al., Dalton Trans., 2008) those that ASE ships. A
property that nobody has measured is null.
"""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

from crysforge.datapipe.crystals.crystal import MAX_Z


def properties(number: int) -> dict[str, Any]:
    """Properties of the element with this atomic number: `group` (0 in the f block), `period`,
    `electronegativity`, `covalent_radius` (pm), `valence_electrons`, `ionisation_energy` (eV),
    `electron_affinity` (eV), `block`, `molar_volume` (cm³/mol)."""
    from ase.data import covalent_radii, missing
    from pymatgen.core import Element

    element = Element.from_Z(number)
    radius = float(covalent_radii[number])
    return {
        "group": 0 if element.block == "f" else element.group,
        "period": element.row,
        "electronegativity": _known(element, "X"),
        "covalent_radius": None if radius == missing else round(100 * radius),
        "valence_electrons": valence_electrons(number),
        "ionisation_energy": _known(element, "ionization_energy"),
        "electron_affinity": _known(element, "electron_affinity"),
        "block": "s" if number == 2 else element.block,
        "molar_volume": _known(element, "molar_volume"),
    }


def valence_electrons(number: int) -> int | None:
    """Electrons outside the noble-gas core, without an f shell that is full, and without a d shell
    that is full where p electrons follow: 2 for Ca, 8 for Fe, 12 for Zn, 3 for Ga. None where
    pymatgen has no electronic structure."""
    inside = {shell for z in NOBLE if z < number for shell in _shells(z)}
    outside = {s: count for s, count in _shells(number).items() if s not in inside}
    if not outside:
        return None
    full = {"f": 14, "d": 10} if any(kind == "p" for _, kind in outside) else {"f": 14}
    return sum(count for (_, kind), count in outside.items() if count != full.get(kind))


NOBLE = (2, 10, 18, 36, 54, 86)


def _shells(number: int) -> dict[tuple[int, str], int]:
    """Electrons in each occupied shell, by (n, kind); empty if unknown."""
    from pymatgen.core import Element

    structure = _value(Element.from_Z(number), "full_electronic_structure") or []
    return {(n, kind): count for n, kind, count in structure}


def _known(element: Any, name: str) -> float | None:
    value = _value(element, name)
    return None if value is None or math.isnan(value) else round(float(value), 4)


def _value(element: Any, name: str) -> Any:
    """A property of an element, None where pymatgen has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(element, name)
        except KeyError:
            return None


if __name__ == "__main__":
    rows = ",\n".join(f'"{z}": {json.dumps(properties(z))}' for z in range(1, MAX_Z + 1))
    print(f"{{\n{rows}\n}}")
