"""Figures of data sets: histograms, and a periodic table of their elements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols

from crysforge.datapipe.crystals.crystal import MAX_Z
from crysforge.trainer.figures.style import (
    STYLE,
    TRAIN,
    new_figure,
    place_of,
    save_png,
    with_unit,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def histograms(
    atoms: np.ndarray,
    elements: Mapping[int, int],
    targets: Mapping[str, np.ndarray],
    units: Mapping[str, str],
    path: str | Path,
) -> None:
    """What is in a data set: a periodic table of its elements, atoms per cell, and every target.

    Args:
        atoms: [N] atoms per cell. elements: crystals that contain each atomic number.
        targets: [N] values by name, NaN where missing. units: unit of each target.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    names = [n for n, v in targets.items() if np.isfinite(np.asarray(v, dtype=float)).any()]
    columns = 2 if len(names) in (1, 3) else min(3, 1 + len(names))
    rows = -(-(1 + len(names)) // columns)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(4.4 + 2.7 * rows)
        grid = figure.add_gridspec(1 + rows, columns, height_ratios=[4.4, *[2.7] * rows])
        _periodic_table(figure, figure.add_subplot(grid[0, :]), elements, len(atoms))
        cells = [
            figure.add_subplot(grid[1 + i // columns, i % columns]) for i in range(1 + len(names))
        ]
        counts = np.asarray(atoms)
        width = max(1, -(-int(counts.max() - counts.min() + 1) // 50))
        bins = np.arange(counts.min(), counts.max() + width + 1, width) - 0.5
        _histogram(cells[0], counts, bins, "atoms per cell")
        cells[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axes, name in zip(cells[1:], names, strict=True):
            values = np.asarray(targets[name], dtype=float)
            values = values[np.isfinite(values)]
            _histogram(axes, values, 40, with_unit(name, units.get(name, "")))
        for i, axes in enumerate(cells):
            axes.set_ylabel("crystals" if i % columns == 0 else "")
        save_png(figure, path)


def _histogram(axes: Any, values: np.ndarray, bins: Any, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.hist(values, bins=bins, color=TRAIN, edgecolor="white", linewidth=0.3)
    axes.set_xlabel(label)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _periodic_table(figure: Figure, axes: Any, elements: Mapping[int, int], total: int) -> None:
    """A cell per element, coloured by the number of crystals that contain it."""
    from matplotlib.colors import LogNorm

    grid = np.full((9, 18), np.nan)
    for number, count in elements.items():
        if count:
            grid[place_of(number)] = count
    top = max([2, *elements.values()])
    axes.grid(visible=False)
    image = axes.pcolormesh(
        np.ma.masked_invalid(grid),
        norm=LogNorm(1, top),
        cmap="YlGnBu",
        edgecolors="white",
        linewidth=1,
    )
    for number in range(1, MAX_Z + 1):
        row, column = place_of(number)
        count = elements.get(number, 0)
        shade = "#bbbbbb" if not count else "white" if count > top**0.6 else "#222222"
        axes.text(
            column + 0.5,
            row + 0.36,
            chemical_symbols[number],
            ha="center",
            va="center",
            color=shade,
            fontsize=11,
            fontweight="bold" if count else "normal",
        )
        if count:
            axes.text(
                column + 0.5,
                row + 0.74,
                _short(count),
                ha="center",
                va="center",
                color=shade,
                fontsize=7,
            )
    axes.set(xlim=(0, 18), ylim=(9, 0), aspect="equal")
    axes.set_axis_off()
    present = sum(1 for c in elements.values() if c)
    axes.set_title(f"{total:,} crystals of {present} elements", loc="left")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
    bar.set_label("crystals with the element")
    bar.outline.set_visible(False)


def _short(count: int) -> str:
    return f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
