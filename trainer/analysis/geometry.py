"""How latents answer to changes of the structure: small displacements, and changes that leave the
crystal what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from crysforge.datapipe.crystals.crystal import Crystal, crystal_key, wrap
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders import Encoder
from crysforge.trainer.analysis.latents import latents
from crysforge.trainer.stages.joint import JointStage

SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Standard deviations of Cartesian displacements in Å."""


def smoothness(
    encoder: Encoder, crystals: Sequence[Crystal], seed: int = 0, sigmas: Sequence[float] = SIGMAS
) -> dict[str, Any]:
    """Δ(σ) = ‖pool f(x + ε) − pool f(x)‖₂ for normal displacements ε of all atoms, and the cosine
    of the two; means over crystals, and a straight line through Δ(σ): its `slope_per_angstrom`,
    its `jump` at σ = 0 and `r2`. An encoder whose graph takes k nearest neighbours with ties jumps:
    the least displacement breaks the ties of symmetric crystals."""
    clean = latents(encoder, crystals).pooled
    size = float(np.linalg.norm(clean, axis=1).mean())
    rows = []
    for number, sigma in enumerate(sigmas):
        shown = [_displaced(c, sigma, crystal_key(seed, number, c.id)) for c in crystals]
        moved = latents(encoder, crystals, shown=shown).pooled
        delta = np.linalg.norm(moved - clean, axis=1)
        rows.append(
            {
                "sigma": sigma,
                "delta": float(delta.mean()),
                "delta_std": float(delta.std()),
                "cosine": float(_cosine(moved, clean).mean()),
            }
        )
    x, y = np.array(sigmas), np.array([r["delta"] for r in rows])
    slope, jump = (float(v) for v in np.polyfit(x, y, 1))
    spread = float(((y - y.mean()) ** 2).sum())
    fit = 1 - float(((y - slope * x - jump) ** 2).sum()) / spread if spread > 0 else float("nan")
    line = {"slope_per_angstrom": slope, "jump": jump, "r2": fit}
    return {"rows": rows, **line, "mean_norm": size}


def invariance(encoder: Encoder, crystals: Sequence[Crystal], seed: int = 0) -> dict[str, Any]:
    """Smallest cosine and largest difference (in units of the latents' spread over crystals) of
    pooled latents before and after what changes no crystal: a rotation, a translation, another
    order of the atoms, and a cell twice as long (which not every encoder takes for the same)."""
    clean = latents(encoder, crystals).pooled
    spread = float(clean.std(0).mean()) or 1.0
    out = {}
    for number, (name, change) in enumerate(_CHANGES.items()):
        rngs = [np.random.default_rng(crystal_key(seed, number, c.id)) for c in crystals]
        changed = [change(c, rng) for c, rng in zip(crystals, rngs, strict=True)]
        moved = latents(encoder, changed).pooled
        out[name] = {
            "cosine": float(_cosine(moved, clean).min()),
            "difference": float(np.abs(moved - clean).max() / spread),
        }
    return out


class Denoised(Encoder):
    """The latents of a stage 2 after its denoiser has seen them half noised, in an encoder's place
    (Appendix G of the CrysLDNet paper)."""

    def __init__(self, stage: JointStage) -> None:
        super().__init__()
        self.stage = stage
        self.graph, self.dim = stage.encoder.graph, stage.encoder.dim

    def nodes(self, batch: CrystalBatch) -> Tensor:
        raise TypeError("latents are denoised by atoms, not by nodes")

    def forward(self, batch: CrystalBatch) -> Tensor:
        return self.stage.denoised(batch)


def _displaced(crystal: Crystal, sigma: float, key: int) -> Crystal:
    shift = np.random.default_rng(key).normal(scale=sigma, size=(len(crystal), 3))
    frac = crystal.frac_coords + shift @ np.linalg.inv(crystal.lattice)
    return replace(crystal, frac_coords=wrap(frac))


def _rotated(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    from scipy.spatial.transform import Rotation

    rotation = Rotation.random(random_state=rng).as_matrix()
    return replace(crystal, lattice=crystal.lattice @ rotation.T)


def _translated(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    return replace(crystal, frac_coords=wrap(crystal.frac_coords + rng.uniform(size=3)))


def _permuted(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    order = rng.permutation(len(crystal))
    return replace(crystal, numbers=crystal.numbers[order], frac_coords=crystal.frac_coords[order])


def _doubled(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    axis = int(rng.integers(3))
    scale = np.ones(3)
    scale[axis] = 2
    step = np.zeros(3)
    step[axis] = 0.5
    frac = crystal.frac_coords / scale
    return replace(
        crystal,
        numbers=np.concatenate([crystal.numbers, crystal.numbers]),
        frac_coords=np.concatenate([frac, frac + step]),
        lattice=crystal.lattice * scale[:, None],
    )


_CHANGES = {
    "rotation": _rotated,
    "translation": _translated,
    "permutation": _permuted,
    "supercell": _doubled,
}


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(norms, 1e-300)
