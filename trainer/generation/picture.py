"""A sheet of crystals to look at: atoms, bonds and the cell, in perspective from one side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.trainer.figures.style import STYLE, new_figure, plain_text, save_png

COLUMNS = 4
VIEW = (12.0, 24.0)
"""Degrees that crystals are turned about x and y."""
_BOND = 1.15
"""A bond is at most so many times the sum of the covalent radii long."""
_EDGE = 0.03
"""Fractional distance from a face at which an atom is on it, and is shown on the other side too."""


def picture(path: Path, crystals: Sequence[tuple[Crystal, str]], columns: int = COLUMNS) -> None:
    """Draws crystals with their captions, row by row, into a PNG file."""
    from matplotlib import rc_context

    rows = -(-len(crystals) // columns)
    with rc_context(STYLE):
        figure = new_figure(2.6 * rows + 0.2, 2.5 * columns)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (crystal, caption) in zip(grid.flat, crystals, strict=False):
            _draw(axes, crystal)
            axes.set_title(plain_text(caption, 80), fontsize=8)
        save_png(figure, path)


def _draw(axes: Any, crystal: Crystal) -> None:
    from pymatgen.core import Element

    numbers, points = _shown(crystal)
    turn = _rotation()
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    middle = crystal.lattice.sum(0) / 2
    places = (points - middle) @ turn
    cell = (corners @ crystal.lattice - middle) @ turn
    for i, j in itertools.combinations(range(8), 2):
        if np.abs(corners[i] - corners[j]).sum() == 1:
            depth = (cell[i, 2] + cell[j, 2]) / 2
            axes.plot(*cell[[i, j], :2].T, color="#777777", linewidth=0.8, zorder=depth)
    radii = covalent_radii[numbers]
    metal = np.array([Element.from_Z(int(z)).is_metal for z in numbers])
    for i, j in itertools.combinations(range(len(numbers)), 2):
        if metal[i] and metal[j] and not metal.all():
            continue  # cations side by side
        if np.linalg.norm(points[i] - points[j]) < _BOND * (radii[i] + radii[j]):
            depth = (places[i, 2] + places[j, 2]) / 2
            axes.plot(*places[[i, j], :2].T, color="#b0b0b0", linewidth=2.0, zorder=depth)
    for z, place, radius in zip(numbers, places, radii, strict=True):
        circle = _circle(place[:2], 0.45 * radius, jmol_colors[z], place[2])
        axes.add_patch(circle)
    reach = max(np.abs(cell[:, :2]).max(), np.abs(places[:, :2]).max()) + 1
    axes.set_xlim(-1.35 * reach, reach)  # room for the legend
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    for row, z in enumerate(sorted(set(numbers.tolist()))):
        y = reach * (0.92 - 0.16 * row)
        axes.add_patch(_circle((-1.27 * reach, y), 0.05 * reach, jmol_colors[z], 1e3))
        axes.text(-1.17 * reach, y, chemical_symbols[z], fontsize=7, va="center", zorder=1e3)


def _circle(centre: Any, radius: float, colour: Any, depth: float) -> Any:
    from matplotlib.patches import Circle

    return Circle(
        centre, radius, facecolor=colour, edgecolor="#333333", linewidth=0.6, zorder=depth
    )


def _shown(crystal: Crystal) -> tuple[np.ndarray, np.ndarray]:
    """Atomic numbers and places in Å of the cell's atoms, those on its faces on both sides. The
    origin, which means nothing, is put at the first of the largest atoms."""
    corner = crystal.frac_coords[np.argmax(covalent_radii[crystal.numbers])]
    numbers, frac = [], []
    for z, x in zip(crystal.numbers.astype(int), (crystal.frac_coords - corner) % 1, strict=True):
        sides = [[v, v + 1] if v < _EDGE else [v, v - 1] if v > 1 - _EDGE else [v] for v in x]
        for place in itertools.product(*sides):
            numbers.append(z)
            frac.append(place)
    return np.array(numbers), np.array(frac) @ crystal.lattice


def _rotation() -> np.ndarray:
    """[3, 3] from Cartesian rows to the view: x to the right, y up, z to the eye."""
    a, b = np.radians(VIEW)
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    upright = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # c points up
    return (about_x @ about_y @ upright).T
