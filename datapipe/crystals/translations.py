"""The pure translations of a crystal: which parts of its cell are copies of one another.

A translation that maps the crystal onto itself, taken as often as the cell holds copies, is a
translation of the cell. So its components are whole multiples of 1/order, where the order divides
the number of atoms of every element. That leaves few candidates, mostly none, and makes those that
remain exact: the primitive cell divides the given one without a remainder, whatever the noise.

Letters: n atoms of the cell, m translations, r = n/m atoms of the primitive cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from crysforge.datapipe.crystals.crystal import Crystal

_AT_ONCE = 200_000
"""Pairs of atoms that are looked at together."""

_PROBES = 4
"""Atoms that all candidates are tried on before each one is tried on every atom."""


@dataclass(frozen=True)
class Translations:
    """A group of pure translations and the atoms of one of the copies.

    Attributes:
        order: number that all `steps` are divided by.
        steps: [m, 3] whole numbers; the translations are `steps / order` in lattice vectors.
        atoms: [r] the first atom of each set of copies, ascending.
        places: [r, 3] fractional coordinates of these atoms, averaged over their copies.
    """

    order: int
    steps: np.ndarray
    atoms: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def basis(self) -> np.ndarray:
        """[3, 3] rows: a basis of the lattice of all translations, in lattice vectors."""
        rows = np.eye(3) * self.order
        for axis in range(3):  # of the vectors that end at this axis, the shortest step along it
            ends = self.steps[(self.steps[:, axis + 1 :] == 0).all(axis=1)]
            ends = ends[ends[:, axis] > 0]
            if len(ends):
                rows[axis] = ends[ends[:, axis].argmin()]
        return rows / self.order


def translations(crystal: Crystal, tolerance: float) -> Translations:
    """The largest group of pure translations that is found within a tolerance in Å: no atom is
    further than that from the mean of its copies. The identity alone if there is no other."""
    counts = np.bincount(crystal.numbers)
    order = math.gcd(*counts[counts > 0].tolist())
    every = np.arange(len(crystal))
    alone = Translations(order, np.zeros((1, 3), dtype=np.int64), every, crystal.frac_coords)
    if order == 1:
        return alone
    search = _Search(crystal, order, tolerance)
    found, images = alone, every[None]
    for step in search.candidates(int(np.where(counts > 0, counts, counts.max() + 1).argmin())):
        if (found.steps == step).all(axis=1).any():
            continue
        onto = search.onto(step)
        if onto is not None:
            steps, grown = _generated(found.steps, images, step, onto, order)
            larger = search.averaged(steps, grown)
            if larger is not None:
                found, images = larger, grown
        if len(found) == order:
            break
    return found


@dataclass(frozen=True)
class _Search:
    crystal: Crystal
    order: int
    tolerance: float

    def candidates(self, rare: int) -> np.ndarray:
        """[c, 3] steps that may be translations, by the atoms of the rarest element. Two atoms that
        are each within the tolerance of their places are within twice that of each other. A group
        has an element of prime order, so without one there is no need to look for others."""
        frac = self.crystal.frac_coords[self.crystal.numbers == rare]
        away = frac[1:] - frac[0]
        parts = [d for d in range(2, self.order + 1) if self.order % d == 0]
        prime = [d for d in parts if all(d % e for e in parts if e < d)]
        found = self._like(self._fractions(away, prime))
        if not len(found) or len(prime) == len(parts):
            return found
        return self._like(self._fractions(away, parts))

    def _fractions(self, away: np.ndarray, parts: list[int]) -> np.ndarray:
        """The steps that are near a difference of fractional coordinates: multiples of 1/part."""
        found = []
        for part in parts:
            whole = np.rint(away * part)
            near = self._length(away - whole / part) <= 2 * self.tolerance
            found.append(whole[near].astype(np.int64) * (self.order // part) % self.order)
        steps = np.concatenate(found)
        steps = steps[steps.any(axis=1)]
        return np.unique(steps, axis=0) if len(steps) > 1 else steps

    def _like(self, steps: np.ndarray) -> np.ndarray:
        """Those of the steps that bring the first atoms to places of like ones."""
        for atom in range(min(_PROBES, len(self.crystal))):
            if not len(steps):
                break
            alike = np.flatnonzero(self.crystal.numbers == self.crystal.numbers[atom])
            block = max(1, _AT_ONCE // len(alike))
            nearest = [
                self._length(self._between(part, atom, alike)).min(axis=1)
                for part in np.split(steps, range(block, len(steps), block))
            ]
            steps = steps[np.concatenate(nearest) <= 2 * self.tolerance]
        return steps

    def onto(self, step: np.ndarray) -> np.ndarray | None:
        """[n] the atom whose place each atom comes to; None if some come to no like atom's."""
        crystal = self.crystal
        out = np.empty(len(crystal), dtype=np.int64)
        for number in np.unique(crystal.numbers):
            alike = np.flatnonzero(crystal.numbers == number)
            block = max(1, _AT_ONCE // len(alike))
            for start in range(0, len(alike), block):
                some = alike[start : start + block]
                away = crystal.frac_coords[some] + step / self.order
                away = away[:, None] - crystal.frac_coords[alike]
                length = self._length(away - np.rint(away))
                if (length.min(axis=1) > 2 * self.tolerance).any():
                    return None
                out[some] = alike[length.argmin(axis=1)]
        return out if len(np.unique(out)) == len(out) else None

    def averaged(self, steps: np.ndarray, images: np.ndarray) -> Translations | None:
        """The translations [m, 3] with `images` [m, n] of the atoms; None if an atom is too far
        from the mean of its copies."""
        frac = self.crystal.frac_coords
        atoms = np.flatnonzero(images.min(axis=0) == np.arange(len(frac)))
        if len(atoms) * len(steps) != len(frac):
            return None
        away = frac[images[:, atoms]] - (steps / self.order)[:, None] - frac[atoms]
        away -= np.rint(away)
        mean = away.mean(axis=0)
        if self._length(away - mean).max() > self.tolerance:
            return None
        return Translations(self.order, steps, atoms, frac[atoms] + mean)

    def _between(self, steps: np.ndarray, atom: int, alike: np.ndarray) -> np.ndarray:
        frac = self.crystal.frac_coords
        away = (frac[atom] + steps / self.order)[:, None] - frac[alike]
        return away - np.rint(away)

    def _length(self, away: np.ndarray) -> np.ndarray:
        """Å of differences of fractional coordinates."""
        vectors = away @ self.crystal.lattice
        return np.sqrt(np.einsum("...i,...i->...", vectors, vectors))


def _generated(
    steps: np.ndarray, images: np.ndarray, step: np.ndarray, onto: np.ndarray, order: int
) -> tuple[np.ndarray, np.ndarray]:
    """The group that a group and one more translation generate: steps and images of all."""
    all_steps, all_images = [steps], [images]
    shift, place = step, onto
    while not (steps == shift).all(axis=1).any():
        all_steps.append((steps + shift) % order)
        all_images.append(place[images])
        shift, place = (shift + step) % order, onto[place]
    return np.concatenate(all_steps), np.concatenate(all_images)
