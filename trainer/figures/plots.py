"""Figures of runs and data sets as PNG files: parity, learning curves, histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crysforge.trainer.figures.style import (
    STYLE,
    TRAIN,
    VAL,
    WIDTH,
    crowding,
    new_figure,
    plain_text,
    pretty_unit,
    save_png,
    with_unit,
)

if TYPE_CHECKING:
    pass


def parity_plot(
    target: np.ndarray, prediction: np.ndarray, name: str, unit: str, path: str | Path
) -> None:
    """Predictions over labels, both [n] in physical units; denser regions are brighter.

    Crystals whose label or prediction is not finite are left out.

    Raises:
        ValueError: no crystal has both.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    x, y = np.asarray(target, dtype=float), np.asarray(prediction, dtype=float)
    present = np.isfinite(x) & np.isfinite(y)
    x, y = x[present], y[present]
    if len(x) == 0:
        raise ValueError(f"no crystal has both a label and a prediction of {name!r} to plot")
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.04 * (high - low) or 0.5
    limits = (low - margin, high + margin)
    density = crowding(x, y, limits)
    order = density.argsort()  # the densest on top
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.86 * WIDTH)
        axes = figure.add_subplot()
        axes.plot(limits, limits, color="#444444", linewidth=1.2, linestyle="--", zorder=1)
        dots = axes.scatter(
            x[order],
            y[order],
            c=density[order],
            s=float(np.clip(9000 / len(x), 5, 40)),
            norm=LogNorm(1, max(density.max(), 2)),
            alpha=0.85,
            linewidths=0,
            zorder=2,
        )
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.set_xlabel(f"{with_unit(name, unit)}, label")
        axes.set_ylabel(f"{with_unit(name, unit)}, predicted")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_title(_scores(x, y, unit), loc="left")
        if density.max() >= 5:
            bar = figure.colorbar(dots, ax=axes, shrink=0.6, pad=0.02)
            bar.set_label("crystals nearby")
            bar.outline.set_visible(False)
        save_png(figure, path)


def calibration_plot(
    error: np.ndarray,
    uncertainty: np.ndarray,
    fit: Mapping[str, Any],
    name: str,
    unit: str,
    path: str | Path,
) -> None:
    """Left: shares of errors within intervals that are to hold so many, and what a right
    uncertainty would give. Right: root mean square error over the uncertainty, in ten groups of
    equally many crystals.

    Args:
        error, uncertainty: [n] in physical units. fit: from `ensemble.calibration`.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.5 * WIDTH)
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color="#444444", linewidth=1.2, linestyle="--")
        expected, observed = [0, *fit["expected"], 1], [0, *fit["observed"], 1]
        left.plot(expected, observed, color=TRAIN, marker="o", markersize=4)
        left.fill_between(expected, expected, observed, color=TRAIN, alpha=0.15, linewidth=0)
        left.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        left.set(xlabel="share expected in the interval", ylabel="share observed")
        left.set_title(f"miscalibration area {fit['area']:.3f}", loc="left")
        order = np.argsort(uncertainty)
        groups = [g for g in np.array_split(order, min(10, len(order))) if len(g)]
        sigma = np.array([np.sqrt((uncertainty[g] ** 2).mean()) for g in groups])
        rmse = np.array([np.sqrt((error[g] ** 2).mean()) for g in groups])
        high = 1.08 * max(sigma.max(), rmse.max())
        right.plot([0, high], [0, high], color="#444444", linewidth=1.2, linestyle="--")
        right.plot(sigma, rmse, color=VAL, marker="o", markersize=5)
        right.set(xlim=(0, high), ylim=(0, high), aspect="equal")
        right.set(xlabel=f"uncertainty of {with_unit(name, unit)}", ylabel="root mean square error")
        right.set_title(f"rank correlation {fit['rank_correlation']:.2f}", loc="left")
        save_png(figure, path)


def learning_curves(
    history: Mapping[str, Sequence[tuple[int, float]]],
    path: str | Path,
    units: Mapping[str, str] | None = None,
) -> None:
    """One panel per quantity over the optimiser steps, training and validation together.

    Args:
        history: (step, value) pairs by name, as the log has them: `train/<quantity>`,
            `val/<quantity>` and `optim/lr`; other names are not drawn.
        units: unit of each target, for the panels `mae/<target>`.

    Raises:
        ValueError: nothing to draw.
    """
    import matplotlib

    quantities: dict[str, dict[str, np.ndarray]] = {}
    for name, points in history.items():
        split, _, quantity = name.partition("/")
        curve = np.array([p for p in points if np.isfinite(p[1])], dtype=float).reshape(-1, 2)
        if len(curve) and (split in ("train", "val") or name == "optim/lr"):
            quantities.setdefault(quantity, {})[split] = curve
    if _is_copy(quantities.get("loss"), [c for q, c in quantities.items() if q != "loss"]):
        del quantities["loss"]
    if not quantities:
        raise ValueError(f"no learning curves to draw: the log has {sorted(history) or 'nothing'}")
    names = sorted(quantities, key=lambda q: (q == "lr", q != "loss", not q.startswith("mae/")))
    columns = 2 if len(names) <= 4 else 3
    rows = -(-len(names) // columns)
    with matplotlib.rc_context(STYLE | {"font.size": 12 if columns == 2 else 10}):
        figure = new_figure(2.9 * rows if columns == 2 else 2.4 * rows)
        grid = figure.add_gridspec(rows, columns)
        spare = rows * columns - len(names) if columns == 2 else 0  # the first panel is then wide
        for i, quantity in enumerate(names):
            row, column = divmod(i + spare if i else 0, columns)
            axes = figure.add_subplot(grid[row, :] if i == 0 and spare else grid[row, column])
            _curves(axes, quantity, quantities[quantity], units or {})
            if i >= len(names) - columns:
                axes.set_xlabel("optimiser step")
        save_png(figure, path)


def _scores(target: np.ndarray, prediction: np.ndarray, unit: str) -> str:
    error = prediction - target
    mae = float(np.abs(error).mean())
    text = f"MAE {mae:.3g} {pretty_unit(unit)}".rstrip()
    spread = float(((target - target.mean()) ** 2).sum())
    if spread > 0:
        text += f"    R² {1 - float((error**2).sum()) / spread:.3f}"
    return f"{text}    {len(target):,} crystals"


def _is_copy(loss: dict[str, np.ndarray] | None, others: list[dict[str, np.ndarray]]) -> bool:
    """Whether the loss is one of the other quantities under a second name."""
    return loss is not None and any(
        all(split in o and np.array_equal(loss[split], o[split]) for split in loss) for o in others
    )


def _curves(
    axes: Any, quantity: str, curves: Mapping[str, np.ndarray], units: Mapping[str, str]
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for split, color, label in (
        ("train", TRAIN, "training"),
        ("val", VAL, "validation"),
        ("optim", "#555555", None),
    ):
        if split in curves:
            step, value = curves[split].T
            marker = "o" if len(step) < 40 else None
            axes.plot(step, value, color=color, label=label, marker=marker, markersize=3.5)
    if "val" in curves and quantity.startswith("mae/"):
        step, value = curves["val"].T
        best = value.argmin()
        axes.axhline(value[best], color=VAL, linewidth=1, linestyle=":")
        axes.plot(step[best], value[best], "o", color=VAL, markersize=8, fillstyle="none")
        title = f"best {value[best]:.3g}, step {step[best]:.0f}"
        axes.set_title(title, loc="right", fontsize="small", color=VAL)
    values = np.concatenate([c[:, 1] for c in curves.values()])
    falls = quantity != "lr" and "accuracy" not in quantity
    if falls and values.min() > 0 and values.max() > 5 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if quantity == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    target = quantity.removeprefix("mae/")
    unit = units.get(target, "") if target != quantity else ""
    words = {"lr": "learning rate"}
    axes.set_ylabel(
        f"MAE, {with_unit(target, unit)}"
        if target != quantity
        else plain_text(words.get(quantity, quantity))
    )
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if "train" in curves and "val" in curves:
        axes.legend(loc="best")
