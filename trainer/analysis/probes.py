"""Reconstruction probes: how much of elements, coordinates and lattices a linear map can read from
frozen latents.

Fitted on crystals of one part and judged on another. The element is that of masked atoms (softmax
regression), coordinates are fractional and lattices in Å (ridge regression, with the penalty that
is best on a tenth of the fitting part). Beside them stands what needs no latents: the commonest
element and the mean.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from crysforge.trainer.analysis.latents import Latents

PENALTIES = (1e-6, 1e-4, 1e-2, 1e0)
"""Ridge penalties tried, in units of the latents' variance."""


def reconstruction(
    fit: Latents, judge: Latents, fit_masked: Latents, judge_masked: Latents
) -> dict[str, float]:
    """Accuracy of elements, mean absolute errors of coordinates and lattices, each beside its
    baseline.

    Args:
        fit, judge: of whole crystals. fit_masked, judge_masked: with masked atoms.
    """
    hidden, asked = fit_masked.masked, judge_masked.masked
    known, wanted = fit_masked.numbers[hidden], judge_masked.numbers[asked]
    guess = classify(fit_masked.atoms[hidden], known, judge_masked.atoms[asked])
    commonest = np.bincount(known).argmax()
    coords = regress(fit.atoms, fit.frac_coords, judge.atoms)
    cells = [np.stack([c.lattice.ravel() for c in part.crystals]) for part in (fit, judge)]
    lattice = regress(fit.pooled, cells[0], judge.pooled)
    middle = fit.frac_coords.mean(0)
    return {
        "element_accuracy": float((guess == wanted).mean()),
        "element_accuracy_commonest": float((wanted == commonest).mean()),
        "coords_mae": float(np.abs(coords - judge.frac_coords).mean()),
        "coords_mae_mean": float(np.abs(middle - judge.frac_coords).mean()),
        "lattice_mae": float(np.abs(lattice - cells[1]).mean()),
        "lattice_mae_mean": float(np.abs(cells[0].mean(0) - cells[1]).mean()),
        "masked_atoms": int(asked.sum()),
    }


def regress(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Ridge regression from x [n, D] to y [n, T], at `asked` [m, D]."""
    mean, scale = x.mean(0), x.std(0) + 1e-9
    x, asked = (x - mean) / scale, (asked - mean) / scale
    held = np.arange(len(x)) % 10 == 0
    errors = [np.abs(_ridge(x[~held], y[~held], x[held], p) - y[held]).mean() for p in PENALTIES]
    return _ridge(x, y, asked, PENALTIES[int(np.argmin(errors))])


def _ridge(x: np.ndarray, y: np.ndarray, asked: np.ndarray, penalty: float) -> np.ndarray:
    middle = y.mean(0)
    gram = x.T @ x + penalty * len(x) * np.eye(x.shape[1])
    return asked @ np.linalg.solve(gram, x.T @ (y - middle)) + middle


def classify(x: np.ndarray, y: np.ndarray, asked: np.ndarray, decay: float = 1e-4) -> np.ndarray:
    """Softmax regression from x [n, D] to classes y [n], at `asked` [m, D]; deterministic."""
    classes, index = np.unique(y, return_inverse=True)
    mean, scale = x.mean(0), x.std(0) + 1e-9
    inputs, labels = torch.from_numpy((x - mean) / scale), torch.from_numpy(index)
    layer = nn.Linear(x.shape[1], len(classes), dtype=torch.float64)
    for p in layer.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(inputs), labels)
        loss = loss + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return classes[layer(torch.from_numpy((asked - mean) / scale)).argmax(1).numpy()]
