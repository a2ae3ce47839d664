"""A small data set, and what of it is lost to damage."""

from __future__ import annotations

import numpy as np

from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.storage.dataset import DatasetWriter

COUNT, SHARD = 45, 15


def make_crystals(random_crystal):
    rng = np.random.default_rng(0)
    return [random_crystal(rng, 1 + i % 6, f"mp-{i}", {"gap": float(i)}) for i in range(COUNT)]


def write(root, crystals, shard_size=SHARD):
    with DatasetWriter(root, ["gap"], shard_size=shard_size) as writer:
        for crystal in crystals:
            writer.add("train", crystal)
        return writer.finish({})


def equal(a, b):
    return (a.id, a.targets) == (b.id, b.targets) and all(
        np.array_equal(getattr(a, k), getattr(b, k)) for k in ("numbers", "frac_coords", "lattice")
    )


def lost(dataset, crystals, items):
    """Items that cannot be read; the others must be as they were."""
    found = list(dataset.read(items))
    assert [i for i, _ in found] == list(items)
    bad = [(i, c) for i, c in found if isinstance(c, BadCrystal)]
    assert all(dataset.where(i) in str(c) for i, c in bad)
    gone = [i for i, _ in bad]
    assert all(equal(c, crystals[i]) for i, c in found if i not in gone)
    return gone
