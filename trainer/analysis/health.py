"""Whether latents are alive: their variance, how many directions they use, and how it went during
the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from crysforge.trainer.analysis.latents import Latents
from crysforge.trainer.runs.logger import read_metrics

DEAD = 1e-6
"""Channels of a smaller variance, relative to the mean square of all, count as dead."""


def collapse(found: Latents) -> dict[str, Any]:
    """Signs of collapse, over atoms.

    Returns:
        `variance`, mean over channels of the variance over atoms; `effective_rank`, the exponential
        of the entropy of the normalised singular values; `dead_channels`, a share;
        `pairwise_cosine`, mean over random pairs of crystals; `collapsed` if the rank is below 2,
        more than 90 % of the channels are dead, or all crystals are alike (cosine above 0.9999);
        and `why`.
    """
    atoms = found.atoms
    variance = atoms.var(0)
    scale = float((atoms**2).mean()) or 1.0
    values = np.linalg.svd(atoms - atoms.mean(0), compute_uv=False)
    shares = values / values.sum() if values.sum() > 0 else np.array([1.0])
    shares = shares[shares > 0]
    rank = float(np.exp(-(shares * np.log(shares)).sum()))
    dead = float((variance < DEAD * scale).mean())
    rows = found.pooled[np.random.default_rng(0).integers(len(found.pooled), size=(5000, 2))]
    norms = np.linalg.norm(rows, axis=2).prod(1)
    cosine = float(((rows[:, 0] * rows[:, 1]).sum(1) / np.maximum(norms, 1e-300)).mean())
    why = [
        text
        for bad, text in (
            (rank < 2, f"effective rank {rank:.2f}"),
            (dead > 0.9, f"{dead:.0%} of the channels are dead"),
            (cosine > 0.9999, f"crystals are alike: cosine {cosine:.5f}"),
        )
        if bad
    ]
    return {
        "variance": float(variance.mean()),
        "effective_rank": rank,
        "channels": atoms.shape[1],
        "dead_channels": dead,
        "pairwise_cosine": cosine,
        "collapsed": bool(why),
        "why": ", ".join(why),
    }


def variance_over_training(run: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Latent variance by step, as the joint stage logged it; empty for models without that."""
    path = Path(run)
    if not (path / "metrics.jsonl").is_file():
        return {}
    curves = read_metrics(path, "joint")
    return {k: v for k, v in curves.items() if k.endswith("/latent_variance")}
