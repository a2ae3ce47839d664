"""Arms as bars with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from crysforge.trainer.evaluation.compare import Arm
from crysforge.trainer.evaluation.statistics import improvement
from crysforge.trainer.reports.formats import places

if TYPE_CHECKING:
    pass
from crysforge.trainer.reports.figures import (
    BAND_FROM,
    STYLE,
    ArmStyle,
    headline,
    mae_label,
    panel_row,
    save,
)


def bars(
    lines: dict[str, list[Arm]], look: ArmStyle, path: Path, confidence: float, title: str
) -> None:
    """MAE of each compared value as a bar, with its interval, its seeds and its gain over the
    baseline; one panel for each task."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    tallest = max(len(line) for line in lines.values())
    with matplotlib.rc_context(STYLE):
        figure, panels = panel_row(len(lines), 1.0 + 0.42 * tallest)
        for axes, (name, line) in zip(panels, lines.items(), strict=True):
            base = next((a for a in line if look.is_baseline(look.value(a))), None)
            floor = base.summary() if base else None
            tops = [_bar(axes, i, arm, look, confidence) for i, arm in enumerate(line)]
            right = max(tops)
            digits = places([arm.mean(lambda r: r.scores["mae"]) for arm in line])
            for i, arm in enumerate(line):
                mean = arm.mean(lambda r: r.scores["mae"])
                text = f"{mean:.{digits}f}"
                if floor and arm is not base:
                    text += f"  ({-improvement(mean, floor.mean):+.1f} %)".replace("-", "−")
                axes.text(right * 1.04, i, text, va="center", fontsize="small")
            if floor:
                axes.axvline(floor.mean, color="#444444", linewidth=1, linestyle="--", zorder=3)
            axes.set_xlim(0, right * 1.6)
            axes.set_ylim(len(line) - 0.4, -0.6)
            axes.set_yticks(range(len(line)), [look.name(a) for a in line])
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", visible=False)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_title(name, loc="left")
            axes.set_xlabel(mae_label(line[0]))
        whisker = f"{100 * confidence:g} % confidence interval, of 2 seeds standard deviation"
        headline(figure, title, f"dots: seeds; whiskers: {whisker}")
        save(figure, path)


def _bar(axes: Any, place: int, arm: Arm, look: ArmStyle, confidence: float) -> float:
    """Draws one; returns how far it reaches to the right."""
    found = arm.summary("mae", confidence)
    assert found is not None
    axes.barh(
        place, found.mean, height=0.66, color=look.color(arm), hatch=look.hatch(arm),
        edgecolor="white", linewidth=0, zorder=2,
    )  # fmt: skip
    values = arm.scores("mae")
    top = max(values)
    if found.n > 1:
        half = (found.high - found.mean) if found.n >= BAND_FROM else found.std
        half = min(half, found.mean)
        axes.errorbar(
            found.mean, place, xerr=half, color="#222222", capsize=3, linewidth=1.2, zorder=4
        )
        axes.plot(values, [place] * len(values), "o", color="#222222", markersize=3, zorder=5,
                  fillstyle="none", markeredgewidth=0.8)  # fmt: skip
        top = max(top, found.mean + half)
    return float(top)
