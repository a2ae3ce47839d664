"""Settings of the loader, and how many edges a crystal may have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from crysforge.datapipe.common.workers import MAX_WORKERS
from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage.remote import Access


@dataclass(kw_only=True)
class LoaderConfig:
    """How batches are made. `shuffle` and `lanes` change the order of crystals, the limits change
    how many a step takes; nothing else here changes what is in a batch."""

    workers: int = 2
    """Loader processes per rank; 0 makes the batches in the training process."""
    prefetch: int = 4
    """Steps that each worker works ahead."""
    max_atoms: int | None = None
    """Most atoms of one rank in one step; a step takes fewer crystals to stay below."""
    max_edges: int | None = None
    """Most edges of one rank in one step, by an estimate that is good to a few per cent."""
    shuffle: int = 16384
    """Shuffle window in crystals. Data sets that fit are shuffled whole and kept in memory."""
    lanes: int | None = None
    """Parallel sequences the data is cut into: at least as many as ranks, better as all workers.
    None: the largest divisor of the batch size up to 64."""
    cache_mb: int = 512
    """Memory of a rank for graphs that are kept from epoch to epoch."""
    max_pairs: int = MAX_PAIRS
    """Pairs of atoms, or images of atoms, that are looked at for the graph of one crystal; one that
    needs more is skipped."""
    max_bad: int = 100
    """Unusable crystals that a rank skips before it stops."""
    tries: int = 5
    """Attempts at reading a file from a URL."""
    timeout_s: float = 300.0
    """Seconds after which an attempt is given up."""
    cache_dir: str | None = None
    """Local disk to which shards are copied when they are first used, for all processes of the
    machine. None: those of a URL go to the temporary directory, local ones are not copied."""
    cache_gb: float = 20.0
    """Size of the copies; when they are more, those unused for longest go. Below one shard for
    each lane, shards are fetched again and again."""

    def __post_init__(self) -> None:
        least = {"workers": 0, "prefetch": 1, "cache_mb": 0, "max_bad": 0, "tries": 1}
        least |= {"max_pairs": 1, "max_atoms": 1, "max_edges": 1, "shuffle": 0, "lanes": 1}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"loader.{name} must be at least {value}, got {given}")
        for name, most in (("workers", MAX_WORKERS), ("prefetch", 10_000), ("tries", 10_000)):
            if getattr(self, name) > most:
                raise ValueError(f"loader.{name} must be at most {most}, got {getattr(self, name)}")
        for name in ("timeout_s", "cache_gb"):
            if not 0 < getattr(self, name) <= 1e9:
                raise ValueError(
                    f"loader.{name} must be above 0 and at most 1e9, got {getattr(self, name)}"
                )

    @property
    def access(self) -> Access:
        """How shards are reached."""
        names = ("tries", "timeout_s", "cache_dir", "cache_gb")
        return Access(**{name: getattr(self, name) for name in names})


def estimate_edges(spec: GraphSpec, atoms: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """Expected edges of the plain graph of each crystal, [n] int64.

    Joining the neighbours of both ends and keeping ties adds about 15 % to k neighbours per atom
    on Materials Project crystals; a radius holds what the mean density says.
    """
    if spec.neighbors is not None:
        per_atom = np.full(len(atoms), 1.15 * spec.neighbors)
    else:
        assert spec.radius is not None
        per_atom = atoms / volume * (4 / 3 * math.pi * spec.radius**3)
    images = {"none": 0, "matformer": 12, "comformer": 6}[spec.lattice_edges]
    partners = 0 if spec.pair_sums == "none" else atoms
    return np.ceil(atoms * (per_atom + images + partners)).astype(np.int64)
