"""One basis for each lattice, whatever basis it is given in.

It is Niggli's: the three shortest vectors, all angles between them acute, or else none of them
(Gruber, Acta Cryst. A 29, 433, 1973). Niggli's rules compare numbers, and the symmetric lattices of
real crystals are those in which these are equal: the last digit of a file then turns 60° into 120°.
So here what differs by less than `TIE` is equal. Of the bases that the rules leave, which are as
many as the lattice has rotations, the crystal's own diffraction intensities choose: bases that they
cannot tell apart are related by a symmetry of the crystal, or nearly so.

Letters: c candidates for the basis, h reflections.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
from numpy.linalg import inv

from crysforge.datapipe.crystals.crystal import MAX_Z, Crystal

TIE = 1e-3
"""Å: lengths that differ by less are equal; so are scalar products over the longest vector."""

_ROUNDS = 1000
"""Steps of reduction at most; crystals that someone drew take two or three."""


def _half(reach: int) -> np.ndarray:
    """[h, 3] whole vectors with components up to `reach`, one of each pair ±v."""
    every = itertools.product(range(-reach, reach + 1), repeat=3)
    return np.array([v for v in every if v > (0, 0, 0)])


_SHORT = _half(1)
"""[13, 3] what the shortest vectors of a lattice are made of in a reduced basis."""
_OWN = [8, 2, 0]
"""a, b and c among them."""
_PARTS = np.abs(_SHORT)
"""[13, 3] which of these each is made of."""
_TRIPLES = np.array(
    [
        (i, j, k) if hand > 0 else (j, i, k)
        for i, j, k in itertools.combinations(range(len(_SHORT)), 3)
        if abs(hand := round(np.linalg.det(_SHORT[[i, j, k]]))) == 1
    ]
)
"""[145, 3] those three of them that are a basis, right-handed."""
_TURNS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
    if round(np.linalg.det(np.eye(3)[list(order)])) == np.prod(signs)
]
"""Orders and signs that leave three vectors right-handed."""
_SIGNS = np.array([signs for _, signs in _TURNS])
_VECTORS = _TRIPLES[:, [order for order, _ in _TURNS]].reshape(-1, 3)
"""[3480, 3] the short vectors of every right-handed basis, but for their signs."""
_BASES = _SHORT[_VECTORS] * np.tile(_SIGNS, (len(_TRIPLES), 1))[..., None]
"""[3480, 3, 3] these bases."""
_OTHERS = np.tile(_SIGNS.prod(axis=1, keepdims=True) * _SIGNS, (len(_TRIPLES), 1))
"""[3480, 3] signs of b·c, a·c and a·b."""
_LOW = np.array([v for v in _half(2) if np.abs(v).sum() <= 3])
"""[28, 3] reflections of low index."""
_WEIGHTS = np.cos(_LOW @ np.sqrt([2.0, 3.0, 5.0]))
"""[28] different for every reflection, equal for ±h."""
_SCATTERING = 0.5 + np.arange(MAX_Z + 1) * (5**0.5 - 1) / 2 % 1
"""What an atom scatters, by atomic number: never nearly the same for two elements."""
_INDEX = np.rint(_LOW @ inv(_BASES).swapaxes(-1, -2)).astype(np.int64)
"""[3480, 28, 3] what these are in the basis that the short vectors are made of."""
_CODES, _PLACE = np.unique((_INDEX + 8) @ (256, 16, 1), return_inverse=True)
_PLACE = _PLACE.reshape(_INDEX.shape[:2])
"""[3480, 28] their numbers among all reflections that occur."""
_REFLECTIONS = np.stack([_CODES // 256, _CODES // 16 % 16, _CODES % 16], axis=1) - 8
"""[628, 3] those."""
_MOST = int(np.abs(_REFLECTIONS).max())
_UNIT = np.eye(3)


def standard_basis(crystal: Crystal) -> np.ndarray:
    """[3, 3] whole numbers: rows of the standard basis in the crystal's lattice vectors. It has
    determinant 1."""
    start, metric = _reduced(crystal.lattice)
    length = np.sqrt(metric.diagonal()).tolist()
    shortest = sorted(length[v] for v in _OWN)
    likely = _likely(*(tuple(x < most + TIE for x in length) for most in shortest))
    vectors = _VECTORS[likely]
    products = metric[vectors[:, (1, 0, 0)], vectors[:, (2, 2, 1)]] * _OTHERS[likely] / shortest[2]
    keep = _nigglis(products)
    if len(keep) > 1:
        keep = keep[_brightest(crystal, start, _PLACE[likely[keep]])]
    if len(keep) > 1:
        lengths = np.sqrt(metric.diagonal())[vectors[keep]]
        keep = keep[_least(np.concatenate([lengths, products[keep]], axis=1))]
    found = _BASES[likely[keep]] @ start
    own = (found == _UNIT).all(axis=(1, 2))  # of equal ones, the basis that is there
    return np.rint(found[own.argmax()]).astype(np.int64)


def _reduced(lattice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A basis of shortest vectors (Minkowski's): its rows [3, 3] in the lattice's vectors, and the
    scalar products [13, 13] in Å² of the short vectors made of it."""
    basis = _UNIT.copy()
    for _ in range(_ROUNDS):
        vectors = _SHORT @ (basis @ lattice)
        metric = vectors @ vectors.T
        square = metric.diagonal()
        if (square >= (_PARTS * square[_OWN]).max(axis=1) - 1e-9).all():
            break  # no sum is shorter than its longest part
        own = metric[np.ix_(_OWN, _OWN)]
        steps = np.rint(own / own.diagonal()) * (1 - _UNIT)
        i, j = divmod(int(np.abs(steps).argmax()), 3)
        if abs(steps[i, j]) > 1:  # far from reduced: straighten the most slanting vector
            basis[i] -= steps[i, j] * basis[j]
            continue
        triples = np.sort(square[_TRIPLES], axis=1)
        basis = _SHORT[_TRIPLES[np.lexsort(triples.T[::-1])[0]]] @ basis
    return basis, metric


@lru_cache(maxsize=10_000)
def _likely(*short: tuple[bool, ...]) -> np.ndarray:
    """Numbers of the bases whose first, second and third vector are among those [13] each."""
    fits = [np.array(among)[_VECTORS[:, axis]] for axis, among in enumerate(short)]
    return np.flatnonzero(np.logical_and.reduce(fits))


def _nigglis(products: np.ndarray) -> np.ndarray:
    """Numbers of the bases that Niggli's conditions leave. Ties go to the larger sum of scalar
    products where angles are acute, else to the smaller; then to the smaller b·c, a·c and a·b.

    Args:
        products: [c, 3] b·c, a·c and a·b over the longest vector, in Å.
    """
    size = np.abs(products)
    acute = (products > TIE).all(axis=1)
    if acute.any():
        left, total = np.flatnonzero(acute), -size.sum(axis=1)
    else:
        left, total = np.flatnonzero((products <= TIE).all(axis=1)), size.sum(axis=1)
    for key in (total, size[:, 0], size[:, 1], size[:, 2]):
        if len(left) > 1:
            left = left[key[left] <= key[left].min() + TIE]
    return left


def _least(columns: np.ndarray) -> np.ndarray:
    """Numbers of the bases [c, 6] that come first by lengths and scalar products in Å, so that of
    two vectors that are nearly equal always the same one comes first."""
    if (np.ptp(columns, axis=0) < TIE / 100).all():
        return np.arange(len(columns))
    least = columns[np.lexsort(np.round(columns, 6).T[::-1])[0]]
    return np.flatnonzero((np.abs(columns - least) < TIE / 100).all(axis=1))


def _brightest(crystal: Crystal, start: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Numbers of the bases in which the weighted sum of the intensities of low index is largest.

    Args:
        start: [3, 3] rows of the basis that reflections are counted in, in lattice vectors.
        place: [c, 28] the reflections of each basis.
    """
    wanted = np.zeros(len(_REFLECTIONS), dtype=bool)
    wanted[place] = True
    frac = crystal.frac_coords if (start == _UNIT).all() else crystal.frac_coords @ inv(start)
    wave = np.exp(2j * math.pi * frac.T)
    powers = np.cumprod(np.broadcast_to(wave, (_MOST, *wave.shape)), axis=0)
    powers = np.concatenate([powers[::-1].conj(), np.ones_like(powers[:1]), powers])
    h, k, l = _REFLECTIONS[wanted].T + _MOST
    amplitude = (powers[h, 0] * powers[k, 1] * powers[l, 2]) @ _SCATTERING[crystal.numbers]
    intensity = np.empty(len(_REFLECTIONS))
    intensity[wanted] = (amplitude.real**2 + amplitude.imag**2) / len(frac) ** 2
    score = intensity[place] @ _WEIGHTS
    return np.flatnonzero(score > score.max() - 1e-5)
