"""Noise on the coordinates and the cell of what an encoder sees, for denoising."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from crysforge.datapipe.crystals.crystal import wrap
from crysforge.datapipe.crystals.lattice import lattice_constants, standard_lattice
from crysforge.datapipe.graphs.transforms import Sample, Step, displaced

LEAST_VOLUME = 0.1
"""Share of its volume that a cell must keep under uniform noise."""
MOST_DRAWS = 1000
"""Draws of lattice noise before it is taken for impossible."""


@dataclass(frozen=True)
class NoisePositions(Step):
    """Adds normal noise to the Cartesian coordinates of what is seen."""

    std: float
    """Å."""

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return displaced(sample, self.std * rng.standard_normal((len(sample.seen), 3)))


@dataclass(frozen=True)
class NoiseFractions(Step):
    """Adds uniform noise to the fractional coordinates of what is seen (DPF's released code): every
    atom moves towards larger coordinates, the further the larger the cell."""

    most: float
    """Largest noise, as a share of each lattice vector."""

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        frac = sample.seen.frac_coords + rng.uniform(0, self.most, (len(sample.seen), 3))
        return replace(sample, seen=replace(sample.seen, frac_coords=wrap(frac)))


@dataclass(frozen=True)
class NoiseLattice(Step):
    """Adds normal noise to the six lattice constants of what is seen: a, b, c in Å and the angles
    in degrees alike. Fractional coordinates stay as they are. A cell that is none, or whose volume
    has more than doubled or halved, is drawn again.
    """

    std: float
    """Å and degrees."""

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        seen = sample.seen
        constants = lattice_constants(seen.lattice)
        for _ in range(MOST_DRAWS):
            lattice = standard_lattice(constants + self.std * rng.standard_normal(6))
            if lattice is not None and 0.5 < np.linalg.det(lattice) / seen.volume < 2:
                return replace(sample, seen=replace(seen, lattice=lattice))
        raise ValueError(
            f"{MOST_DRAWS} draws of lattice noise {self.std} gave no sound cell: the lattice is "
            "too small or too flat for so much noise"
        )


@dataclass(frozen=True)
class NoiseLatticeEntries(Step):
    """Adds uniform noise to the nine entries of the lattice of what is seen (DPF's released code),
    in the standard orientation, to which the noisy cell is turned again. Fractional coordinates
    stay as they are. A cell that is next to flat is drawn again.
    """

    most: float
    """Largest noise in Å."""

    def on_crystal(self, sample: Sample, rng: np.random.Generator) -> Sample:
        seen = sample.seen
        for _ in range(MOST_DRAWS):
            noisy = seen.lattice + rng.uniform(0, self.most, (3, 3))
            if abs(np.linalg.det(noisy)) > LEAST_VOLUME * seen.volume:
                lattice = np.linalg.cholesky(noisy @ noisy.T)
                return replace(sample, seen=replace(seen, lattice=lattice))
        raise ValueError(
            f"{MOST_DRAWS} draws of lattice noise {self.most} gave no sound cell: the lattice is "
            "too small or too flat for so much noise"
        )
