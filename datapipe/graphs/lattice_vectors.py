"""Lattice vectors that do not depend on the choice of the cell."""

from __future__ import annotations

import itertools

import numpy as np

from crysforge.datapipe.crystals.lattice import reduction

_PERIODIC = np.ones(3, dtype=np.int64)


def lattice_triple(lattice: np.ndarray) -> np.ndarray:
    """Images [3, 3] of the three shortest independent lattice vectors (ComFormer's invariant
    triple up to signs, which edges in both directions do not show). Vectors of equal length are
    ordered by image, so the triple is deterministic; lengths are compared at 1e-6 Å."""
    image = _STEPS @ reduction(lattice)
    length = np.rint(np.linalg.norm(image @ lattice, axis=1) * 1e6)
    image = image[np.lexsort([*image.T[::-1], length])]
    first = image[0]
    second = next(step for step in image if any(_cross(step, first)))
    normal = _cross(first, second)
    third = next(step for step in image if step @ normal)
    return np.stack([first, second, third])


_STEPS = np.array([step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)])
"""Images in a reduced basis: the three shortest vectors and all of equal length are among them."""


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (ax, ay, az), (bx, by, bz) = a.tolist(), b.tolist()
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])


def signed_triple(lattice: np.ndarray) -> np.ndarray:
    """Rows [3, 3] in Å of ComFormer's invariant lattice vectors (Yan et al., ICLR 2024): the second
    and third are at most at a right angle to the first, then all three are turned round if they are
    left-handed. Vectors of equal length are told apart by image, so the triple of a lattice that
    has such depends on the basis it is given in; angles are compared at 1e-6."""
    v = lattice_triple(lattice) @ lattice
    length = np.linalg.norm(v, axis=1)
    v[(v @ v[0]) / (length * length[0]) < -1e-6] *= -1
    return v if np.linalg.det(v) > 0 else -v
