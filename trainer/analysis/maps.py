"""Two-dimensional maps of crystals by their latents: principal components as a figure, and all
latents for TensorBoard's projector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols
from ase.formula import Formula

from crysforge.datapipe.common.escape import one_line
from crysforge.trainer.analysis.latents import Latents
from crysforge.trainer.figures.style import STYLE, new_figure, save_png, with_unit

TAG = "latents"


def components(x: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Principal components [n, count] of rows, and the share of the variance each holds. The sign
    is that in which the largest loading is positive."""
    centred = x - x.mean(0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:count]
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])
    total = float((values**2).sum()) or 1.0
    return centred @ (directions * signs[:, None]).T, values[:count] ** 2 / total


def latent_map(found: Latents, units: Mapping[str, str], path: str | Path) -> list[float]:
    """One panel for each target and one for the number of atoms, each crystal a dot at its first
    two principal components of standardised channels; crystals without the label are grey, and the
    axes end where 1 % of the crystals lie outside on each side. Returns the components' shares of
    the variance."""
    import matplotlib
    from matplotlib.colors import Normalize

    pooled = found.pooled
    place, share = components(pooled / (pooled.std(0) + 1e-12))
    limits = [_middle(place[:, i]) for i in range(place.shape[1])]
    columns = {n: np.array([c.targets.get(n, np.nan) for c in found.crystals]) for n in units}
    columns["atoms per cell"] = np.array([len(c) for c in found.crystals], dtype=float)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        rows = -(-len(columns) // 2)
        figure = new_figure(3.6 * rows)
        grid = figure.add_gridspec(rows, min(2, len(columns)))
        for i, (name, values) in enumerate(columns.items()):
            axes = figure.add_subplot(grid[i // 2, i % 2])
            known = np.isfinite(values)
            axes.scatter(place[~known, 0], place[~known, 1], s=5, c="#cccccc", linewidths=0)
            norm = Normalize(*np.percentile(values[known], [2, 98])) if known.any() else None
            shown = np.flatnonzero(known)[np.argsort(values[known])]
            x, y = place[shown].T
            dots = axes.scatter(x, y, s=6, c=values[shown], norm=norm, linewidths=0)
            if known.any():
                figure.colorbar(dots, ax=axes)
            axes.set_title(with_unit(name, units.get(name, "")), loc="left", fontsize=11)
            axes.set(xlim=limits[0], ylim=limits[1])
            axes.set_xlabel(f"first component ({share[0]:.0%} of the variance)")
            axes.set_ylabel(f"second ({share[1]:.0%})" if len(share) > 1 else "")
        save_png(figure, path)
    return share.tolist()


def projector(found: Latents, targets: list[str], path: str | Path) -> None:
    """Latents with id, formula, number of atoms and targets, as TensorBoard's projector reads
    them: `tensorboard --logdir PATH`."""
    rows = [
        [
            one_line(c.id),
            Formula.from_list([chemical_symbols[z] for z in c.numbers]).format("reduce"),
            len(c),
            *(f"{c.targets.get(name, np.nan):.6g}" for name in targets),
        ]
        for c in found.crystals
    ]
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(path)) as writer:
        writer.add_embedding(
            found.pooled.astype(np.float32),
            metadata=rows,
            metadata_header=["id", "formula", "atoms", *map(one_line, targets)],
            tag=TAG,
        )


def _middle(x: np.ndarray) -> tuple[float, float]:
    """The range of all but 1 % on each side, with a margin."""
    low, high = np.percentile(x, [1, 99])
    margin = 0.1 * (high - low) or 1.0
    return float(low - margin), float(high + margin)
