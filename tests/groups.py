"""Crystals of several formulas, many of them the same structure, and what becomes of them."""

from __future__ import annotations

import random

import numpy as np

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import SPLITS
from tests.duplicates import AB, other_view, polymorph, store


def make_input(root, order: int = 0, extra: bool = False) -> str:
    """120 crystals of 24 formulas, several polymorphs and copies of each; `metal` is a class."""
    rng = np.random.default_rng(1)
    made = []
    for i in range(120):
        pair = (3 + 4 * (i % 6), (8, 9, 16, 17)[i % 4])
        crystal = polymorph(list(AB)[i % 5], *pair, "")
        made.append(other_view(crystal, rng, f"c-{i}").with_targets(
            {"gap": float(rng.random()), "metal": float(i % 3 == 0)}
        ))  # fmt: skip
    if extra:
        made.append(Crystal.create("odd", [1, 1], [[0, 0, 0], [0, 0, 0.001]], np.eye(3) * 4))
    random.Random(order).shuffle(made)
    return store(root, train=made)


def config(source, output, **values) -> PrepareConfig:
    plain = {"input": str(source), "output": str(output), "workers": 1, "progress": False}
    return PrepareConfig(**plain | values)


def members(root) -> dict[str, set[str]]:
    dataset = Dataset.open(root)
    return {s: {c.id for _, c in dataset.read(dataset.split_items(s))} for s in SPLITS}
