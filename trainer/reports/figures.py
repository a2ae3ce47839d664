"""Figures of a report: parity, errors over labels, bars of what is compared; as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crysforge.datapipe.common.files import replacing
from crysforge.trainer.evaluation.compare import Arm
from crysforge.trainer.evaluation.suite import Suite
from crysforge.trainer.figures import style as drawing
from crysforge.trainer.figures.style import (
    WIDTH,
    crowding,
    new_figure,
    plain_text,
    pretty_unit,
    save_png,
    with_unit,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "#9a9a9a"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by colour-blind readers (Okabe and Ito); the baseline is grey."""
MARKERS = "os^Dv<>"
DASHES: tuple[Any, ...] = ("-", "--", (0, (5, 1, 1, 1)), (0, (1, 1)), "-.", (0, (6, 2)), "-")
BAND_FROM = 3
"""Fewest seeds whose confidence interval is drawn; of two it is 13 times their distance."""
STYLE: Any = drawing.STYLE | {
    "font.size": 10.5,
    "axes.labelsize": "medium",
    "axes.titlesize": "medium",
    "figure.titlesize": "large",
    "svg.hashsalt": "crysforge",
    "hatch.linewidth": 0.6,
}


def stage_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]], ylabel: str, path: Path
) -> None:
    """Losses of one stage of several runs over the optimiser's steps, on a log scale."""
    import matplotlib.ticker

    with matplotlib.rc_context(STYLE):
        figure = new_figure(4.0)
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(curves.items()):
            x, y = zip(*points, strict=True)
            k = i % len(COLORS)
            axes.plot(x, y, color=COLORS[k], linestyle=DASHES[k], label=plain_text(name))
        axes.set(xlabel="optimiser step", ylabel=ylabel, yscale="log")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter("{x:g}")
        axes.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))
        axes.legend(fontsize="small")
        save(figure, path)


class ArmStyle:
    """Colour, marker and dash of each compared value, the same in all figures of a report."""

    def __init__(self, suite: Suite, arms: Sequence[Arm]) -> None:
        self.compared, self.baseline = suite.compared, suite.baseline
        values = list(dict.fromkeys(map(self.value, arms)))
        self._rank = {v: i for i, v in enumerate(v for v in values if not self.is_baseline(v))}

    def value(self, arm: Arm) -> str:
        """What is compared of an arm."""
        return arm.values[self.compared] if self.compared else ""

    def is_baseline(self, value: str) -> bool:
        """Whether this is what the others are compared with."""
        return bool(self.compared) and value == self.baseline

    def name(self, arm: Arm) -> str:
        """For legends and titles."""
        value = self.value(arm)
        return plain_text(
            f"{self.compared}: {value}" if self.is_baseline(value) else value or "all"
        )

    def color(self, arm: Arm) -> str:
        """Its colour."""
        value = self.value(arm)
        return BASELINE if self.is_baseline(value) else COLORS[self._rank[value] % len(COLORS)]

    def hatch(self, arm: Arm) -> str:
        """Pattern of its bars, for prints without colour."""
        rank = self._rank.get(self.value(arm), 0)
        return ("", "//", "..", "\\\\", "xx", "--", "++")[rank % 7]

    def line(self, arm: Arm) -> dict[str, Any]:
        """How its curve is drawn."""
        value = self.value(arm)
        if self.is_baseline(value):
            return {"color": "#5a5a5a", "marker": "X", "linestyle": (0, (4, 2))}
        i = self._rank[value]
        style = {"color": self.color(arm), "marker": MARKERS[i % 7], "linestyle": DASHES[i % 7]}
        return style


def save(figure: Figure, path: Path) -> None:
    """Writes PATH.png and PATH.svg; the same figure gives the same bytes."""
    png, svg = (path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg"))
    save_png(figure, png)
    with replacing(svg, "wb", durable=False) as file:
        figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None})


def headline(figure: Figure, title: str, note: str = "") -> None:
    """A title at the left, and below it a note on how to read the figure."""
    text = "\n".join(filter(None, (plain_text(title, 110), note)))
    figure.suptitle(text, x=0.01, ha="left", fontsize="medium" if note else "large")


def mae_label(arm: Arm) -> str:
    """For the axis of errors."""
    return with_unit("MAE", arm.first.unit)


def parity(line: Sequence[Arm], title: str, look: ArmStyle, path: Path) -> None:
    """Predictions over labels of one replicate of each arm, denser regions darker; at most six
    arms: the baseline and those with the lowest MAE."""
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    if len(line) > 6:
        ranked = sorted(line, key=lambda a: (not look.is_baseline(look.value(a)), a.summary().mean))  # type: ignore[union-attr]
        line = [a for a in line if a in ranked[:6]]
    seeds = [s for s in line[0].results if all(s in a.results for a in line)]
    runs = [a.results[seeds[0]] if seeds else a.first for a in line]
    points = [r.predictions for r in runs]
    low = min(min(p.label.min(), p.prediction.min()) for p in points)
    high = max(max(p.label.max(), p.prediction.max()) for p in points)
    margin = 0.04 * (high - low) or 0.5
    limits = (float(low - margin), float(high + margin))
    columns = min(3, len(line))
    rows = -(-len(line) // columns)
    side = {1: 5.0, 2: 3.55, 3: 2.55}[columns]
    with matplotlib.rc_context(STYLE | {"font.size": 10.5 if columns < 3 else 9}):
        figure = new_figure(rows * side + 0.85, WIDTH if columns > 1 else 6.5)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        densities = [crowding(p.label, p.prediction, limits) for p in points]
        norm = LogNorm(1, max(2, *(d.max() for d in densities)))
        dots = None
        for axes, arm, p, density in zip(grid.flat, line, points, densities, strict=False):
            order = density.argsort(kind="stable")
            axes.plot(limits, limits, color="#444444", linewidth=1, linestyle="--", zorder=1)
            dots = axes.scatter(
                p.label[order], p.prediction[order], c=density[order], norm=norm,
                s=float(np.clip(6000 / len(order), 3, 25)), linewidths=0, zorder=2,
                cmap="viridis_r", rasterized=True,
            )  # fmt: skip
            axes.set(xlim=limits, ylim=limits, aspect="equal")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.set_xlabel(with_unit("label", arm.first.unit))
            axes.set_ylabel(with_unit("prediction", arm.first.unit))
            axes.label_outer()
            score = f"MAE {p.error.mean():.3g} {pretty_unit(arm.first.unit)}".rstrip()
            axes.set_title(f"{look.name(arm)}\n{score}", loc="left")
        for axes in list(grid.flat)[len(line) :]:
            axes.set_visible(False)
        if dots is not None:
            bar = figure.colorbar(dots, ax=grid, shrink=0.6, pad=0.02)
            bar.set_label("crystals nearby")
            bar.outline.set_visible(False)
        seed = seeds[0] if seeds else ""
        seed = f", {'' if 'fold' in seed else 'seed '}{seed}" if seed else ""
        headline(figure, f"{title}{seed}")
        save(figure, path)


def label_curves(
    curves: dict[str, list[Arm]], look: ArmStyle, path: Path, confidence: float
) -> None:
    """MAE over the number of training labels, on logarithmic axes; one panel for each task.

    Args:
        curves: the arms of each panel, by its title.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, panels = panel_row(len(curves), 3.7)
        handles: dict[str, Any] = {}
        for axes, (name, arms) in zip(panels, curves.items(), strict=True):
            by_value: dict[str, list[Arm]] = {}
            for arm in sorted(arms, key=lambda a: a.first.labels):
                by_value.setdefault(look.value(arm), []).append(arm)
            for line in by_value.values():
                handles.setdefault(look.name(line[0]), _curve(axes, line, look, confidence))
            _log_ticks(axes, [a.first.labels for a in arms], [a.scores("mae") for a in arms])
            axes.set_title(plain_text(name), loc="left")
            axes.set_ylabel(mae_label(arms[0]))
            axes.set_xlabel("training labels")
        _legend(figure, handles)
        seeds = [len(a.results) for arms in curves.values() for a in arms]
        band = f"dots: seeds; bands: {100 * confidence:g} % confidence interval"
        band += f" (of {BAND_FROM} seeds and more)" if min(seeds) < BAND_FROM else ""
        note = band if max(seeds) > 1 else "one seed each"
        headline(figure, "Error over training labels", note)
        save(figure, path)


def _curve(axes: Any, line: Sequence[Arm], look: ArmStyle, confidence: float) -> Any:
    x = np.array([a.first.labels for a in line], dtype=float)
    found = [a.summary("mae", confidence) for a in line]
    mean = np.array([s.mean for s in found if s])
    style = look.line(line[0])
    wide = np.array([s.n >= BAND_FROM for s in found if s])
    low = np.array([s.low if s.n >= BAND_FROM else s.mean for s in found if s])
    high = np.array([s.high if s.n >= BAND_FROM else s.mean for s in found if s])
    if wide.any():
        floor = 0.5 * min(min(a.scores("mae")) for a in line)  # a log axis has no zero
        axes.fill_between(
            x, np.maximum(low, floor), high, color=style["color"], alpha=0.18, linewidth=0
        )
    for arm, at in zip(line, x, strict=True):
        values = arm.scores("mae")
        if len(values) > 1:
            axes.plot(
                [at] * len(values), values, ".", color=style["color"], markersize=4, alpha=0.6
            )
    return axes.plot(x, mean, markersize=6, **style)[0]


def panel_row(count: int, height: float) -> tuple[Figure, list[Any]]:
    """A figure with so many panels, up to three beside each other, each so high in inches."""
    columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
    rows = -(-count // columns)
    figure = new_figure(rows * height + 0.5, {1: 6.5, 2: WIDTH}.get(columns, 1.35 * WIDTH))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    if len(handles) > 1:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center",
                      ncols=min(4, len(handles)))  # fmt: skip


def _log_ticks(axes: Any, labels: Sequence[int], values: Sequence[Sequence[float]]) -> None:
    """Logarithmic axes with plain numbers: the labels that were used, and 1, 1.5, 2, 3, 5, 7."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    flat = [v for some in values for v in some]
    if min(flat) <= 0:
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(set(labels)), [f"{n:,}" for n in sorted(set(labels))])
    axes.tick_params(axis="x", labelrotation=30)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(LogLocator(subs=()))
    low, high = min(flat), max(flat)
    axes.set_ylim(0.85 * low, 1.15 * high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), numticks=99))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
