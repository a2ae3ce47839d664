"""How much a search for neighbours would look at, counted before it allocates anything."""

from __future__ import annotations

import itertools
import math

import numpy as np

from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.crystals.lattice import reduction

MAX_PAIRS = 10_000_000
"""Pairs of atoms, or images of atoms, that a search for the neighbours of one crystal may look at.
It takes about 1 GB; 20,000 atoms with 60 neighbours each stay below."""

_MAX_BINS = 1 << 20
"""Bins along an axis."""


class PairBound:
    """Upper bounds of what a search for all pairs of atoms within a radius in Å looks at.

    Args:
        points: [n, 3] Cartesian, Å. lattice: [3, 3] rows, Å.
        most: pairs, images of atoms or bins that may be looked at.
    """

    def __init__(self, points: np.ndarray, lattice: np.ndarray, most: int = MAX_PAIRS) -> None:
        self._inverse = np.linalg.inv(lattice)
        self._heights = 1 / np.sqrt((self._inverse**2).sum(axis=0))  # between lattice planes
        self._extent = points.max(axis=0) - points.min(axis=0)
        self._points, self._most = points, most

    def images(self, radius: float) -> int:
        """Images of atoms that are gone through."""
        x, y, z = (2 * math.ceil(radius / height) + 1 for height in self._heights.tolist())
        return len(self._points) * x * y * z

    def bins(self, radius: float) -> int:
        """Cubes as wide as the radius that the search sorts the images around the atoms into."""
        x, y, z = (math.ceil(extent / radius) + 3 for extent in self._extent.tolist())
        return x * y * z

    def work(self, radius: float) -> int:
        """At least as many as there are pairs, images or bins, whichever are most. The atoms'
        places are only looked at where all pairs with all images are too many."""
        images, n = self.images(radius), len(self._points)
        simple = images * n
        if simple > self._most >= images:
            simple = self._pairs_in_bins(radius)
        return max(simple, images, self.bins(radius))

    def _pairs_in_bins(self, radius: float) -> int:
        """Pairs of atoms in the same or adjacent bins that are as wide as the radius."""
        bins = np.clip(self._heights // radius, 1, _MAX_BINS).astype(np.int64)
        bin_of_atom = (self._points @ self._inverse % 1.0 * bins).astype(np.int64) % bins
        place = np.array([bins[1] * bins[2], bins[2], 1])
        keys, counts = np.unique(bin_of_atom @ place, return_counts=True)
        occupied = np.stack(np.unravel_index(keys, bins), axis=1)
        reach = np.ceil(radius * bins / self._heights).astype(int)
        total = 0
        for step in itertools.product(*(range(-r, r + 1) for r in reach)):
            near = (occupied + step) % bins @ place
            at = np.minimum(np.searchsorted(keys, near), len(keys) - 1)
            total += int((counts * counts[at])[keys[at] == near].sum())
        return total

    def check(self, radius: float) -> None:
        """Raises BadCrystal if there is too much to look at."""
        if (work := self.work(radius)) > self._most:
            raise BadCrystal(
                f"{work:.2g} pairs and images of its {len(self._points)} atoms would have to be "
                f"looked at to find its neighbours ({radius:.3g} Å), more than max_pairs="
                f"{self._most}: an atom is far from all others, or too many are in one place",
                "too many pairs",
            )


def compact_cell(points: np.ndarray, lattice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cell in which a search looks at the fewest images and bins: that of the reduced basis,
    with its origin in the widest gaps between the atoms.

    Returns:
        change: [3, 3] integers; `change @ lattice` is the basis.
        cell: [n, 3] whole vectors of it; `points - cell @ basis` are the atoms in that cell.
    """
    change = reduction(lattice)
    place = points @ np.linalg.inv(change @ lattice)
    inside = np.sort(place % 1.0, axis=0)
    gap = np.diff(inside, axis=0, append=inside[:1] + 1)
    origin = inside[gap.argmax(axis=0), range(3)] + gap.max(axis=0) / 2
    return change, np.floor(place - origin)
