"""Lattice vectors that do not depend on the choice of the cell."""

from __future__ import annotations

import numpy as np
from pymatgen.optimization.neighbors import find_points_in_spheres

_PERIODIC = np.ones(3, dtype=np.int64)


def lattice_triple(lattice: np.ndarray) -> np.ndarray:
    """Images [3, 3] of the three shortest independent lattice vectors (ComFormer's invariant
    triple up to signs, which edges in both directions do not show). Vectors of equal length are
    ordered by image, so the triple is deterministic; lengths are compared at 1e-6 Å."""
    radius = float(np.linalg.norm(lattice, axis=1).max()) + 0.01
    origin = np.zeros((1, 3))
    _, _, shift, d = find_points_in_spheres(
        origin, origin, r=radius, pbc=_PERIODIC, lattice=lattice, tol=1e-8
    )
    image, d = np.rint(shift).astype(np.int64)[d > 1e-6], d[d > 1e-6]
    image = image[np.lexsort([image[:, 2], image[:, 1], image[:, 0], np.rint(d * 1e6)])]
    first = image[0]
    second = image[np.any(np.cross(image, first), axis=1)][0]
    third = image[(image @ np.cross(first, second)) != 0][0]
    return np.stack([first, second, third])


def signed_triple(lattice: np.ndarray) -> np.ndarray:
    """Rows [3, 3] in Å of ComFormer's invariant lattice vectors (Yan et al., ICLR 2024): the second
    and third are at most at a right angle to the first, then all three are turned round if they are
    left-handed. Vectors of equal length are told apart by image, so the triple of a lattice that
    has such depends on the basis it is given in; angles are compared at 1e-6."""
    v = lattice_triple(lattice) @ lattice
    length = np.linalg.norm(v, axis=1)
    v[(v @ v[0]) / (length * length[0]) < -1e-6] *= -1
    return v if np.linalg.det(v) > 0 else -v
