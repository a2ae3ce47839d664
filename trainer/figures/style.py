"""What all figures share: size, style and colours, labels with units, places of elements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crysforge.datapipe.common.files import replacing
from crysforge.datapipe.crystals.crystal import MAX_Z

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
WIDTH = 8.0
"""Inches: every figure is 1200 pixels wide."""

TRAIN, VAL = "#3b6ea8", "#d1662a"
STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "image.cmap": "viridis",
    "text.parse_math": False,  # names and units are data, and a $ among them is one
}


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # pyplot and its global state stay out of it
    return figure


def save_png(figure: Figure, path: str | Path) -> None:
    """Replaces a file by the figure; the same figure gives the same bytes."""
    with replacing(path, "wb", durable=False) as file:
        figure.savefig(file, format="png", facecolor="white")


def with_unit(name: str, unit: str) -> str:
    """A label of an axis: the name, and its unit if it has one."""
    return plain_text(f"{name} ({pretty_unit(unit)})" if unit else name)


def plain_text(text: str, longest: int = 60) -> str:
    """A text as figures show it: as it is, no part of it as a formula, the middle of a long one
    left out."""
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-(longest // 2) + 1 :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # legends leave out what starts so


def pretty_unit(unit: str) -> str:
    """A unit as it is printed: powers raised, angstroms by their letter."""
    return unit.replace("A^3", "Å³").replace("cm^3", "cm³").replace("^-1", "⁻¹")


def crowding(x: np.ndarray, y: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Points in the 3 x 3 cells of a 60 x 60 grid around each point, [n]."""
    bins = 60
    count, edges, _ = np.histogram2d(x, y, bins=bins, range=(limits, limits))
    padded = np.pad(count, 1)
    around = sum(padded[i : i + bins, j : j + bins] for i in range(3) for j in range(3))
    cell = [np.clip(np.searchsorted(edges, v, side="right") - 1, 0, bins - 1) for v in (x, y)]
    return np.asarray(around)[cell[0], cell[1]]


def place_of(number: int) -> tuple[int, int]:
    """(row, column) of an element in the 18-column periodic table; the f block is below."""
    for period, (first, noble) in enumerate(
        ((1, 2), (3, 10), (11, 18), (19, 36), (37, 54), (55, 86), (87, 118))
    ):
        if number > noble:
            continue
        step, left = number - first, 2 if period else 1
        if step < left:
            return period, step
        if period >= 5 and step < 16:
            return period + 2, step + 1  # lanthanoids 57-70, actinoids 89-102
        return period, 17 - (noble - number)
    raise ValueError(f"atomic number {number} is not in 1..{MAX_Z}")
