"""Figures of errors by number of atoms, by element and by space group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from crysforge.datapipe.crystals.crystal import MAX_Z
from crysforge.trainer.evaluation.compare import Arm
from crysforge.trainer.evaluation.statistics import improvement
from crysforge.trainer.figures.style import WIDTH, new_figure, place_of
from crysforge.trainer.reports.crystals import (
    BUCKETS,
    SYSTEMS,
    Facts,
    arm_errors,
    means_inside,
)
from crysforge.trainer.reports.figures import STYLE, ArmStyle, headline, mae_label, save
from crysforge.trainer.reports.formats import places

_WHISKERS = "bars: means over seeds, with their standard deviation"
FEWEST = 5
"""Crystals below which an element or a space group has no error of its own."""
_EDGES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 120, 160, 10**9)
Bin = tuple[str, np.ndarray]
"""Its name and which crystals are in it, [n] bool."""


def by_atoms(line: Sequence[Arm], facts: Facts, title: str, look: ArmStyle, path: Path) -> None:
    """MAE over the number of atoms: the three buckets as bars, finer ones as curves."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    atoms = facts.atoms
    wide = [(name, (atoms >= low) & (atoms <= high)) for name, low, high in BUCKETS]
    wide = [b for b in wide if b[1].any()]
    fine = _fine(atoms)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(4.9, 1.25 * WIDTH)
        grid = figure.add_gridspec(2, 2, width_ratios=[1, 2], height_ratios=[3.4, 1])
        left, right = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
        counts = figure.add_subplot(grid[1, 1], sharex=right)
        _grouped(left, line, facts, wide, look)
        left.set_ylabel(mae_label(line[0]))
        left.set_xlabel("atoms per cell")
        x = np.arange(len(fine))
        for arm in line:
            errors = arm_errors(arm, facts)
            means = np.array([means_inside(errors, inside) for _, inside in fine])
            style = look.line(arm)
            right.plot(x, np.nanmean(means, 1), markersize=5, label=look.name(arm), **style)
            if means.shape[1] > 1:
                right.fill_between(
                    x, np.nanmin(means, 1), np.nanmax(means, 1), color=style["color"], alpha=0.15,
                    linewidth=0,
                )  # fmt: skip
        right.tick_params(axis="x", labelbottom=False, length=0)
        right.set_ylim(bottom=0)
        right.set_ylabel(mae_label(line[0]))
        if len(line) > 1:
            handles, labels = right.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        counts.bar(x, [int(inside.sum()) for _, inside in fine], color="#bbbbbb", width=0.8)
        counts.set_xticks(x, [name for name, _ in fine], rotation=45)
        counts.set_xlabel("atoms per cell")
        counts.set_ylabel("crystals")
        counts.grid(axis="x", visible=False)
        counts.yaxis.set_major_locator(MaxNLocator(3))
        spread = "; bands: lowest to highest seed" if len(line[0].results) > 1 else ""
        headline(figure, f"{title}: error by number of atoms", f"{_WHISKERS}{spread}")
        save(figure, path)


def by_space_group(
    line: Sequence[Arm], facts: Facts, title: str, look: ArmStyle, path: Path
) -> None:
    """MAE by crystal system, and of the space groups with most crystals."""
    import matplotlib

    groups = facts.groups
    systems = [(name, (groups >= low) & (groups <= high)) for name, low, high in SYSTEMS]
    systems = [(f"{name}\n{inside.sum():,}", inside) for name, inside in systems
               if inside.sum() >= FEWEST]  # fmt: skip
    numbers, counts = np.unique(groups, return_counts=True)
    most = sorted(numbers[np.argsort(-counts, kind="stable")][:14].tolist())
    common = [(f"{_symbol(n)}\n{(groups == n).sum():,}", groups == n) for n in most
              if (groups == n).sum() >= FEWEST]  # fmt: skip
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.2, 1.25 * WIDTH)
        panels = figure.subplots(2, 1)
        for axes, bins, name in zip(
            panels,
            (systems, common),
            ("crystal system, and its crystals", "space groups with most crystals, by number"),
            strict=True,
        ):
            _grouped(axes, line, facts, bins, look)
            axes.set_xlabel(name)
            axes.set_ylabel(mae_label(line[0]))
        panels[1].tick_params(axis="x", labelsize="small")
        if len(line) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        headline(figure, f"{title}: error by space group", _WHISKERS)
        save(figure, path)


def by_element(line: Sequence[Arm], facts: Facts, title: str, look: ArmStyle, path: Path) -> None:
    """The lowest arm's MAE of the crystals with each element, on the periodic table; below, how
    much lower that is than the baseline's."""
    import matplotlib
    from matplotlib.colors import LogNorm, TwoSlopeNorm

    best = min(line, key=lambda a: a.summary().mean)  # type: ignore[union-attr]
    base = next((a for a in line if look.is_baseline(look.value(a))), None)
    if best is base:
        rest = [a for a in line if a is not base]
        best = min(rest, key=lambda a: a.summary().mean) if rest else best  # type: ignore[union-attr]
    present = [z for z in range(1, MAX_Z + 1) if facts.elements[:, z].sum() >= FEWEST]
    mae = {z: _mean(best, facts, facts.elements[:, z]) for z in present}
    with matplotlib.rc_context(STYLE):
        two = base is not None and base is not best
        figure = new_figure(8.6 if two else 4.7)
        panels = figure.subplots(2 if two else 1, 1, squeeze=False)[:, 0]
        values = list(mae.values()) or [1.0]
        low, high = min(values), max(values)
        norm = LogNorm(low, high if high > low else 2 * low) if low > 0 else None
        digits = places(values, 2)
        label = mae_label(best)
        _periodic(figure, panels[0], mae, norm, "YlGnBu", label,
                  lambda v: f"{v:.{digits}f}")  # fmt: skip
        panels[0].set_title(f"{look.name(best)}: MAE of crystals with the element", loc="left",
                            fontsize="medium")  # fmt: skip
        if two:
            assert base is not None
            gain = {z: improvement(mae[z], _mean(base, facts, facts.elements[:, z]))
                    for z in present}  # fmt: skip
            gain = {z: g for z, g in gain.items() if np.isfinite(g)}
            top = max([1.0, *map(abs, gain.values())])
            _periodic(
                figure, panels[1], gain, TwoSlopeNorm(0, -top, top), "PuOr",
                "lower error / % (orange: higher)", lambda v: f"{v:+.0f}".replace("-", "−"),
            )  # fmt: skip
            name = f"{look.name(best)} against {look.name(base)}: how much lower, in %"
            panels[1].set_title(name, loc="left", fontsize="medium")
        note = f"elements of {FEWEST} crystals and more"
        headline(figure, f"{title}: error by element", note)
        save(figure, path)


def _periodic(
    figure: Any, axes: Any, values: dict[int, float], norm: Any, cmap: str, label: str, text: Any
) -> None:
    """A value for each element, in the cells of the periodic table."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    grid = np.full((9, 18), np.nan)
    for z, value in values.items():
        grid[place_of(z)] = value
    axes.grid(visible=False)
    image = axes.pcolormesh(
        np.ma.masked_invalid(grid), norm=norm, cmap=cmap, edgecolors="white", linewidth=1
    )
    for z in range(1, MAX_Z + 1):
        row, column = place_of(z)
        shade = "#bbbbbb"
        if z in values:
            red, green, blue, _ = image.cmap(image.norm(values[z]))
            shade = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "#222222"
        bold = "bold" if z in values else "normal"
        axes.text(column + 0.5, row + 0.36, chemical_symbols[z], ha="center", va="center",
                  color=shade, fontsize=10, fontweight=bold)  # fmt: skip
        if z in values:
            axes.text(column + 0.5, row + 0.74, text(values[z]), ha="center", va="center",
                      color=shade, fontsize=7)  # fmt: skip
    axes.set(xlim=(0, 18), ylim=(9, 0), aspect="equal")
    axes.set_axis_off()
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.01)
    bar.set_label(label)
    bar.outline.set_visible(False)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        bar.ax.minorticks_off()


def _grouped(
    axes: Any, line: Sequence[Arm], facts: Facts, bins: Sequence[Bin], look: ArmStyle
) -> None:
    """Bars side by side in each bin: mean over seeds, with their standard deviation."""
    width = 0.8 / len(line)
    x = np.arange(len(bins))
    for i, arm in enumerate(line):
        errors = arm_errors(arm, facts)
        means = np.array([means_inside(errors, inside) for _, inside in bins])
        means = means.reshape(len(bins), len(errors))  # also where no group is large enough
        std = [np.nanstd(m, ddof=1) if np.isfinite(m).sum() > 1 else 0.0 for m in means]
        axes.bar(
            x + (i - (len(line) - 1) / 2) * width, np.nanmean(means, 1), 0.92 * width,
            yerr=std if means.shape[1] > 1 else None,
            color=look.color(arm), hatch=look.hatch(arm), edgecolor="white", linewidth=0,
            error_kw={"linewidth": 1, "capsize": 2, "ecolor": "#222222"}, label=look.name(arm),
        )  # fmt: skip
    axes.set_xticks(x, [name for name, _ in bins])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)


def _fine(atoms: np.ndarray, fewest: int = 20) -> list[Bin]:
    """Bins of neighbouring sizes with at least so many crystals each (the last may have fewer)."""
    bins: list[Bin] = []
    start = None
    for low, after in pairwise(_EDGES):
        start = low if start is None else start
        inside = (atoms >= start) & (atoms < after)
        if inside.sum() >= fewest or (after == _EDGES[-1] and inside.any()):
            first, last = int(atoms[inside].min()), int(atoms[inside].max())
            bins.append((str(first) if first == last else f"{first}–{last}", inside))
            start = None
    return bins


def _symbol(number: int) -> str:
    """A space group by its number and symbol, as in `225 Fm-3m`."""
    import spglib

    for hall in range(1, 531):
        kind = spglib.get_spacegroup_type(hall)
        if kind is not None and kind.number == number:
            symbol = re.sub(r"_(\d)", lambda m: "₀₁₂₃₄₅"[int(m[1])], kind.international_short)
            return f"{number}\n{symbol}"
    return str(number)


def _mean(arm: Arm, facts: Facts, inside: np.ndarray) -> float:
    return float(np.nanmean(arm_errors(arm, facts)[:, inside]))
