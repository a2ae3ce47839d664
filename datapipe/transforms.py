"""What a stage does to a crystal before its graph is built.

A transform turns a `Sample` into another one with draws from a generator that is seeded by the
crystal's key, so that the result depends on (seed, epoch, crystal id) alone. The clean crystal
stays in `Sample.crystal` as the target; what the encoder sees is `Sample.seen` and `Sample.masked`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from datapipe.crystal import Crystal


@dataclass(frozen=True)
class Sample:
    """A crystal on its way into a batch."""

    crystal: Crystal
    """The clean crystal: targets of reconstruction, labels, id."""
    key: int
    """Seed of everything random about it in this epoch."""
    masked: np.ndarray
    """[n] bool: atoms whose element the encoder must not see."""
    seen: Crystal
    """The structure whose graph is built; `crystal` itself unless a transform moved atoms."""

    @classmethod
    def clean(cls, crystal: Crystal, key: int = 0) -> Sample:
        """A sample that shows the encoder everything."""
        return cls(crystal, key, np.zeros(len(crystal), dtype=bool), crystal)


Transform = Callable[[Sample, np.random.Generator], Sample]


@dataclass(frozen=True)
class MaskAtoms:
    """Hides the element of max(1, ceil(ratio · n)) atoms, chosen without replacement."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"mask ratio must be in (0, 1], got {self.ratio}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        n = len(sample.crystal)
        count = max(1, math.ceil(self.ratio * n))
        masked = np.zeros(n, dtype=bool)
        masked[rng.choice(n, size=count, replace=False)] = True
        return replace(sample, masked=masked)
