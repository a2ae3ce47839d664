"""Latents of crystals, as the analyses take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from crysforge.datapipe.crystals.crystal import Crystal, crystal_key
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import MaskAtoms, Sample, Step
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.encoders import Encoder


@dataclass
class Latents:
    """What an encoder makes of some crystals.

    Attributes:
        crystals: [B], as they are (whatever the encoder was shown of them).
        atoms: latents of their atoms, float64 [A, D].
        masked: atoms whose element the encoder did not see, bool [A].
    """

    crystals: list[Crystal]
    atoms: np.ndarray
    masked: np.ndarray

    @cached_property
    def owner(self) -> np.ndarray:
        """Crystal of each atom, [A]."""
        return np.repeat(np.arange(len(self.crystals)), [len(c) for c in self.crystals])

    @cached_property
    def pooled(self) -> np.ndarray:
        """Means over the atoms of each crystal, [B, D]."""
        starts = np.cumsum([0, *(len(c) for c in self.crystals)])[:-1]
        counts = np.array([[len(c)] for c in self.crystals])
        return np.add.reduceat(self.atoms, starts, axis=0) / counts

    @cached_property
    def numbers(self) -> np.ndarray:
        """Atomic numbers, [A]."""
        return np.concatenate([c.numbers for c in self.crystals])

    @cached_property
    def frac_coords(self) -> np.ndarray:
        """Fractional coordinates, [A, 3]."""
        return np.concatenate([c.frac_coords for c in self.crystals])


def sample(dataset: Dataset, split: str, count: int, seed: int, least: int = 1) -> list[Crystal]:
    """Crystals of a split with `least` atoms or more, `count` of them drawn by the seed.

    Raises:
        ValueError: there are none.
    """
    items = dataset.split_items(split)
    items = items[dataset.atoms[items] >= least]
    if len(items) > count:
        items = np.sort(np.random.default_rng(seed).permutation(items)[:count])
    found = [c for _, c in dataset.read(items) if isinstance(c, Crystal)]
    if not found:
        raise ValueError(f"the {split!r} split of {dataset.root} has no crystal to look at")
    return found


def latents(
    encoder: Encoder,
    crystals: Sequence[Crystal],
    *,
    mask_ratio: float = 0.0,
    seed: int = 0,
    max_atoms: int = 4096,
    shown: Sequence[Crystal] | None = None,
) -> Latents:
    """Runs an encoder in evaluation mode.

    Args:
        mask_ratio: share of the atoms whose element is hidden, drawn by (seed, id).
        shown: structures to show in the crystals' places, with as many atoms each.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    samples = []
    for crystal, seen in zip(crystals, shown or crystals, strict=True):
        key = crystal_key(seed, 0, crystal.id)
        clean = Sample(crystal, key, np.zeros(len(crystal), dtype=bool), seen)
        hide: Step = MaskAtoms(mask_ratio) if mask_ratio else Step()
        samples.append(hide.on_crystal(clean, np.random.default_rng(key)))
    out: list[np.ndarray] = []
    group: list[Sample] = []
    with torch.no_grad():
        for i, one in enumerate(samples):
            group.append(one)
            size = sum(len(s.crystal) for s in group)
            if i + 1 == len(samples) or size + len(samples[i + 1].crystal) > max_atoms:
                batch = build(group, encoder.graph).to(device)
                out.append(encoder(batch).double().cpu().numpy())
                group = []
    masked = np.concatenate([s.masked for s in samples])
    return Latents(list(crystals), np.concatenate(out), masked)
