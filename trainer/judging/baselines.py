"""Structures of a formula without a model: what a model has to be better than."""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np
from ase.data import covalent_radii

from crysforge.datapipe.crystals.crystal import Crystal, crystal_key
from crysforge.trainer.generation.known import Composition, Known, composition_of

RANDOM, COPY, SWAPPED = BASELINES = ("random coordinates", "same formula", "nearest formula")
MOST_ORDERS = 24
"""Ways to put elements in each other's places that are tried."""


class Baselines:
    """What training crystals alone say of a composition.

    Args:
        known: all crystals of the training split.
    """

    def __init__(self, known: Known) -> None:
        self.known = known
        crystals = [c for group in known.crystals.values() for c in group]
        self._volumes = _volumes(crystals)
        self._kinds: dict[tuple[int, ...], list[Composition]] = defaultdict(list)
        for composition in known.crystals:
            self._kinds[_kind(composition)].append(composition)

    def make(self, name: str, target: Crystal, samples: int, seed: int) -> list[Crystal]:
        """Up to so many structures of a target's composition, the likeliest first."""
        rng = np.random.default_rng(crystal_key(seed, 0, f"{name} {target.id}"))
        if name == RANDOM:
            edge = self.volume(target.numbers) ** (1 / 3)
            frac = rng.random((samples, len(target), 3))
            return [Crystal.create("", target.numbers, x, edge * np.eye(3)) for x in frac]
        if name == COPY:
            same = self.known.crystals.get(composition_of(target), [])
            return [same[i] for i in rng.permutation(len(same))[:samples]]
        return self._swapped(target, samples)

    def volume(self, numbers: np.ndarray) -> float:
        """Å³ of a cell, the sum over its atoms of what their elements take on average."""
        return float(self._volumes[numbers.astype(int)].sum())

    def _swapped(self, target: Crystal, samples: int) -> list[Crystal]:
        """Training structures of other formulas of the same kind, the most alike first, with the
        elements put in place and the volume of those."""
        goal = composition_of(target)
        found: list[tuple[float, Composition, dict[int, int]]] = []
        for other in self._kinds[_kind(goal)]:
            if other == goal:
                continue
            swaps = itertools.islice(_assignments(goal, other), MOST_ORDERS)
            distance, swap = min(((_unlike(s, other), s) for s in swaps), key=lambda pair: pair[0])
            found.append((distance, other, swap))
        found.sort(key=lambda entry: entry[0])
        out: list[Crystal] = []
        for _, other, swap in found:
            for crystal in self.known.crystals[other]:
                numbers = np.array([swap[z] for z in crystal.numbers.tolist()])
                scale = (self.volume(numbers) / crystal.volume) ** (1 / 3)
                cell = scale * crystal.lattice
                out.append(Crystal.create("", numbers, crystal.frac_coords, cell))
                if len(out) == samples:
                    return out
        return out


def _kind(composition: Composition) -> tuple[int, ...]:
    return tuple(sorted(count for _, count in composition))


def _assignments(goal: Composition, other: Composition):
    """Mappings from elements of another composition to those of the goal with equal counts."""
    counts = sorted({n for _, n in goal})
    groups = [([z for z, n in other if n == c], [z for z, n in goal if n == c]) for c in counts]
    for orders in itertools.product(*(itertools.permutations(new) for _, new in groups)):
        yield {
            z: new
            for (old, _), order in zip(groups, orders, strict=True)
            for z, new in zip(old, order, strict=True)
        }


def _unlike(swap: dict[int, int], other: Composition) -> float:
    counts = dict(other)
    return sum(n * float(_difference()[z, swap[z]]) for z, n in counts.items())


@cache
def _difference() -> np.ndarray:
    """[119, 119] how unlike two elements are: by electronegativity, radius and group."""
    from pymatgen.core import Element

    features = np.zeros((119, 3))
    for z in range(1, 119):
        element = Element.from_Z(z)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not every element has one
            negativity = element.X if element.X == element.X else 1.5
        features[z] = negativity / 0.6, covalent_radii[z] / 0.35, element.group / 5
    return np.linalg.norm(features[:, None] - features[None], axis=2)


def _volumes(crystals: Sequence[Crystal]) -> np.ndarray:
    """[119] Å³ that an atom of each element takes: a fit to the cells' volumes with a small pull to
    their mean."""
    counts = np.stack([np.bincount(c.numbers, minlength=119) for c in crystals]).astype(float)
    volumes = np.array([c.volume for c in crystals])
    atoms = counts.sum(1)
    mean = float((volumes / atoms).mean())
    rows, left = counts / atoms[:, None], volumes / atoms - mean
    fit = np.linalg.solve(rows.T @ rows + 0.1 * np.eye(119), rows.T @ left)
    return np.maximum(mean + fit, 0.2 * mean)
