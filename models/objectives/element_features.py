"""The 92 binary features of an element that CGCNN introduced, as targets of reconstruction.

Nine properties, each one-hot over classes or equal bins, as in Xie and Grossman (Phys. Rev. Lett.
120, 145301, 2018); group 0 stands for the f block, which makes 92 columns. The published table
gives the bits of 100 elements and no values. Ours bins public values from `elements.json`, which
`python -m crysforge.datapipe.crystals.elements` makes. So a value near the border of a bin may lie
on its other side, a property that nobody has measured has no bit at all, and elements up to 118 are
there.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.datapipe.schema import MAX_Z

CLASSES: dict[str, list[Any]] = {
    "group": list(range(19)),
    "period": list(range(1, 8)),
    "valence_electrons": list(range(1, 13)),
    "block": ["s", "p", "d", "f"],
}
"""Properties with a column for each value; larger numbers go into the last."""

BINS = {
    "electronegativity": (0.5, 4.0),
    "covalent_radius": (25.0, 250.0),
    "ionisation_energy": (1.3, 3.3),
    "electron_affinity": (-3.0, 3.7),
    "molar_volume": (1.5, 4.3),
}
"""Properties in ten equal bins over a range; values outside go into the first or the last."""

LOGARITHMIC = {"ionisation_energy", "molar_volume"}
"""Binned by their natural logarithm."""

ORDER = (
    "group",
    "period",
    "electronegativity",
    "covalent_radius",
    "valence_electrons",
    "ionisation_energy",
    "electron_affinity",
    "block",
    "molar_volume",
)
SIZES = {**{name: len(values) for name, values in CLASSES.items()}, **dict.fromkeys(BINS, 10)}
NUM_FEATURES = sum(SIZES[name] for name in ORDER)


def column(name: str, value: Any) -> int:
    """Place of a property's value among the property's columns."""
    if name in CLASSES:
        values = CLASSES[name]
        return values.index(value if isinstance(value, str) else min(value, values[-1]))
    low, high = BINS[name]
    scaled = ((math.log(value) if name in LOGARITHMIC else value) - low) / (high - low)
    return min(max(math.floor(10 * scaled), 0), 9)


@functools.cache
def element_features() -> Tensor:
    """[119, 92] float32 of zeros and ones, a row for each atomic number; row 0 (masked) is zero."""
    elements = read_mapping(Path(__file__).with_name("elements.json"))
    table = torch.zeros(MAX_Z + 1, NUM_FEATURES)
    for number, properties in elements.items():
        start = 0
        for name in ORDER:
            if properties[name] is not None:
                table[int(number), start + column(name, properties[name])] = 1
            start += SIZES[name]
    return table
