"""Which crystals to keep: composition, size, density, distances, label ranges."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

import numpy as np
from ase.data import atomic_masses, atomic_numbers, chemical_symbols

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal, plane_distances
from crysforge.datapipe.crystals.pair_bound import PairBound, compact_cell

Range = list[float | None]
"""[least, most], both included; None leaves an end open."""

_GRAMS_PER_CM3 = 1.66053906660
"""1 u/Å³ in g/cm³."""

_PAIRS_AT_ONCE = 1_000_000
_MANY_PAIRS = 20_000_000
"""Pairs and images up to which all are compared."""
_PERIODIC = np.ones(3, dtype=np.int64)


@dataclass(kw_only=True)
class Filters:
    """Crystals outside are left out and counted under a reason. Ranges are `[least, most]`, both
    included; `null` leaves an end open."""

    min_distance: float = 0.5
    """Least distance in Å between two atoms, periodic images included. Closer ones are nonsense:
    unlike the filters below, this one is an error with `on_bad=error`."""
    allow: list[str] = field(default_factory=list)
    """Elements that a crystal may have; empty: all."""
    deny: list[str] = field(default_factory=list)
    """Elements that a crystal may not have."""
    elements: Range | None = None
    """Number of different elements."""
    atoms: Range | None = None
    """Number of atoms in the cell."""
    volume: Range | None = None
    """Volume of the cell in Å³."""
    density: Range | None = None
    """Density in g/cm³."""
    labels: dict[str, Range] = field(default_factory=dict)
    """Ranges of labels in their physical units, for targets or any other field of the source. A
    crystal without the label passes."""
    charge_neutral: bool = False
    """Keep only compositions that usual oxidation states can balance (`is_charge_neutral`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_distance < math.inf:
            raise ValueError(f"filters.min_distance is a distance in Å, got {self.min_distance}")
        for name in ("allow", "deny"):
            for symbol in getattr(self, name):
                if symbol not in atomic_numbers or symbol == "X":
                    raise ValueError(f"filters.{name}: unknown element {symbol!r}")
        ranges = {n: getattr(self, n) for n in ("elements", "atoms", "volume", "density")}
        ranges |= {f"labels.{name}": bounds for name, bounds in self.labels.items()}
        for name, bounds in ranges.items():
            if bounds is not None and (len(bounds) != 2 or not _in_order(bounds)):
                raise ValueError(f"filters.{name} must be [least, most], got {list(bounds)}")

    def check(self, crystal: Crystal) -> tuple[str, str] | None:
        """(reason, message) why a crystal is left out; None if it is kept. `crystal.targets` holds
        the labels that have a range.

        Raises:
            BadCrystal: two atoms are closer than `min_distance`.
        """
        pair = closest_pair(crystal, self.min_distance)
        if pair is not None:
            raise BadCrystal(_too_close(crystal, *pair, self.min_distance), "atoms too close")
        symbols = {chemical_symbols[z] for z in set(crystal.numbers.tolist())}
        denied = (symbols - set(self.allow) if self.allow else set()) | symbols & set(self.deny)
        if denied:
            return "element not wanted", f"has {', '.join(sorted(denied))}"
        measured: list[tuple[str, float, Sequence[float | None] | None]] = [
            ("elements", len(symbols), self.elements),
            ("atoms", len(crystal), self.atoms),
            ("volume", crystal.volume if self.volume else 0.0, self.volume),
            ("density", density(crystal) if self.density else 0.0, self.density),
        ]
        measured += [
            (name, crystal.targets.get(name, math.nan), bounds)
            for name, bounds in self.labels.items()
        ]
        for name, value, bounds in measured:
            if bounds is not None and _outside(value, bounds):
                return f"{name} out of range", f"{name} {value:g} is outside {list(bounds)}"
        if self.charge_neutral and not is_charge_neutral(crystal):
            return "not charge neutral", "no usual oxidation states balance its composition"
        return None


def _in_order(bounds: Sequence[float | None]) -> bool:
    least, most = bounds
    return least is None or most is None or least <= most


def _outside(value: float, bounds: Sequence[float | None]) -> bool:
    """Whether a value is out of range; NaN (unknown) is not."""
    least, most = bounds
    return (least is not None and value < least) or (most is not None and value > most)


def _too_close(crystal: Crystal, i: int, j: int, distance: float, least: float) -> str:
    a, b = (f"{k} ({chemical_symbols[crystal.numbers[k]]})" for k in (i, j))
    what = f"atom {a} and its own image" if i == j else f"atoms {a} and {b}"
    return f"{what} are {distance:.2f} Å apart, closer than {least:g} Å"


def closest_pair(crystal: Crystal, cutoff: float) -> tuple[int, int, float] | None:
    """The closest two atoms if they are less than `cutoff` Å apart: (i, j, distance in Å) with
    i <= j; i = j for an atom and its own image. None if there is no such pair. Of very many
    atoms, or images of a skewed or flat cell, one of the close pairs.

    Two points less than r apart differ by less than r/h along a cell vector, h being the distance
    of its lattice planes: with fractional differences in [-0.5, 0.5), only images up to
    floor(r/h + 0.5) cells away can be so close. For r = 0.5 Å that is mostly the cell itself.
    """
    if cutoff <= 0:
        return None
    reach = tuple(math.floor(cutoff / h + 0.5) for h in plane_distances(crystal.lattice))
    n = len(crystal)
    if max(n, 20) ** 2 * math.prod(2 * r + 1 for r in reach) > _MANY_PAIRS:
        return _close_pair_of_many(crystal, cutoff)
    images = _images(reach)
    best: tuple[int, int, float] | None = None
    block = max(1, _PAIRS_AT_ONCE // (n * len(images)))
    for start in range(0, n, block):
        step = crystal.frac_coords[start : start + block, None] - crystal.frac_coords[None]
        step -= np.floor(step + 0.5)
        steps = step[:, :, None]
        moved = (steps + images if len(images) > 1 else steps) @ crystal.lattice
        square = np.einsum("ijkc,ijkc->ijk", moved, moved)
        rows = np.arange(len(step))
        square[rows, start + rows, len(images) // 2] = np.inf  # an atom and itself
        least = float(square.min())
        if least < cutoff**2 and (best is None or least < best[2] ** 2):
            i, j, _ = np.unravel_index(int(square.argmin()), square.shape)
            best = (min(start + int(i), int(j)), max(start + int(i), int(j)), math.sqrt(least))
    return best


@lru_cache(maxsize=1000)
def _images(reach: tuple[int, ...]) -> np.ndarray:
    """[k, 3] cells up to so many away along each vector; that in the middle is the cell itself."""
    return np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))))


def _close_pair_of_many(crystal: Crystal, cutoff: float) -> tuple[int, int, float] | None:
    """A pair of atoms closer than the cutoff, found in time that grows with their number."""
    from pymatgen.optimization.neighbors import find_points_in_spheres

    points = crystal.frac_coords @ crystal.lattice
    change, cell = compact_cell(points, crystal.lattice)
    basis = change @ crystal.lattice
    shortest = float(np.linalg.norm(basis[0]))
    if shortest < cutoff:
        return 0, 0, shortest
    points -= cell @ basis
    bound = PairBound(points, basis)
    radius = cutoff
    while bound.bins(radius) > _PAIRS_AT_ONCE:
        radius *= 1.5
    order = np.lexsort(np.floor(points / (4 * radius)).T)  # what is together stays together
    for some in np.array_split(order, min(len(points), bound.work(radius) // _PAIRS_AT_ONCE + 1)):
        i, j, image, d = find_points_in_spheres(
            points, points[some], r=radius, pbc=_PERIODIC, lattice=basis, tol=1e-8
        )
        close = (d < cutoff) & ((some[i] != j) | image.any(axis=1))
        if close.any():
            found = np.flatnonzero(close)[d[close].argmin()]
            a, b = int(some[i[found]]), int(j[found])
            return min(a, b), max(a, b), float(d[found])
    return None


def density(crystal: Crystal) -> float:
    """Mass density in g/cm³."""
    return float(atomic_masses[crystal.numbers].sum()) * _GRAMS_PER_CM3 / crystal.volume


def is_charge_neutral(crystal: Crystal) -> bool:
    """Whether oxidation states that occur in the ICSD (as pymatgen lists them) can add up to zero,
    atoms of one element being free to differ. The same criterion as pymatgen's
    `Composition.oxi_state_guesses`, but the work grows linearly with the formula. Pure elements are
    neutral."""
    counts = Counter(crystal.numbers.tolist())
    divisor = math.gcd(*counts.values())
    return _balances(tuple(sorted((z, n // divisor) for z, n in counts.items())))


@lru_cache(maxsize=100_000)
def _balances(formula: tuple[tuple[int, int], ...]) -> bool:
    sums, lowest = 1, 0  # bit k: the charges can add up to lowest + k
    for z, count in formula if len(formula) > 1 else ():
        states = _oxidation_states(z)
        if not states:
            return False
        for _ in range(count):
            sums = functools.reduce(operator.or_, (sums << s - min(states) for s in states))
        lowest += count * min(states)
    return lowest <= 0 and bool(sums >> -lowest & 1)


@cache
def _oxidation_states(z: int) -> tuple[int, ...]:
    from pymatgen.core import Element

    element = Element.from_Z(z)
    return tuple(element.icsd_oxidation_states or element.common_oxidation_states)


def describe(filters: Filters) -> Mapping[str, object]:
    """The filters that are not at rest, for a manifest."""
    values = {f: getattr(filters, f) for f in filters.__dataclass_fields__}
    return {k: v for k, v in values.items() if v not in (None, [], {}, False)}
