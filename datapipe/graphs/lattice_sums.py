"""Sums of an interaction over all periodic images, for every pair of atoms of a crystal.

Each interaction f(r) is split at a width 1/η (Ewald, Ann. Phys. 369, 253, 1921): f is an integral
of Gaussians exp(-t r²) over t; those with t > η² die off within few images, and those with t < η²
within few reciprocal vectors. One list of images and one of reciprocal vectors serve all sums.
"""

from __future__ import annotations

import math

import numpy as np
from pymatgen.optimization.neighbors import find_points_in_spheres
from scipy.special import erf, erfc, erfcx

CLOSEST = 0.5
"""Å. Atoms nearer to each other than any real ones count as this far apart, so that a perturbed
structure has finite sums of a usual size."""

_REACH = 5.0
"""Where Gaussians are cut off: exp(-25) is 1e-11."""

_AT_ONCE = 2_000_000
"""Pairs that are looked at together."""

_PARTNERS = 20
"""Images of each atom within the reach of another: 4/3 π (5/3)³."""

_PERIODIC = np.ones(3, dtype=np.int64)


def potnet_sums(points: np.ndarray, lattice: np.ndarray, scaled: bool) -> np.ndarray:
    """PotNet's feature of every pair of atoms, [n, n]: Coulomb attraction -0.801 Σ 1/r, London
    dispersion -0.074 Σ 1/r⁶ and Pauli repulsion 0.145 Σ exp(-κ r) over all images (Lin et al.,
    ICML 2023), r in Å.

    κ is 3/Å as written in the paper, or with `scaled` 3 / V^(1/6), which is what the released code
    computes and its coefficients were found with.
    """
    volume = abs(np.linalg.det(lattice))
    inverse, sixth, exponential = lattice_sums(points, lattice, 3 / volume ** (scaled / 6))
    return -0.801 * inverse - 0.074 * sixth + 0.145 * exponential


def lattice_sums(points: np.ndarray, lattice: np.ndarray, decay: float) -> np.ndarray:
    """Σ 1/r, Σ 1/r⁶ and Σ exp(-decay · r) over all images of every pair of atoms, [3, n, n].

    Σ 1/r is that of charges in a neutralising uniform background (its analytic continuation). An
    atom's distance to itself counts in the exponential alone.

    Args:
        points: [n, 3] Cartesian, Å. lattice: [3, 3] rows, Å. decay: κ in 1/Å.
    """
    n, volume = len(points), abs(np.linalg.det(lattice))
    eta = 3 / volume ** (1 / 3)
    sums = np.empty((3, n, n))
    step = max(1, _AT_ONCE // (_PARTNERS * n))
    for start in range(0, n, step):
        some = points[start : start + step]
        i, j, image, d = find_points_in_spheres(
            points, some, r=_REACH / eta, pbc=_PERIODIC, lattice=lattice, tol=1e-8
        )
        other = (i + start != j) | image.any(axis=1)
        pair, d = (i * n + j)[other], np.maximum(d[other], CLOSEST)
        for total, f in zip(sums, _near(d, eta, decay), strict=True):
            near = np.bincount(pair, f, minlength=n * len(some))
            total[start : start + step] = near.reshape(-1, n)

    vectors = _reciprocal(lattice, 2 * eta * _REACH)
    weights = _far(np.linalg.norm(vectors, axis=1), eta, decay, volume)
    weights[:, 1:] *= 2  # of each vector and its opposite, one is in the list
    phase = points @ vectors.T
    for wave in (np.cos(phase), np.sin(phase)):
        sums += (wave * weights[:, None]) @ wave.T

    sums[:, np.arange(n), np.arange(n)] += _itself(eta, decay)[:, None]
    return (sums + sums.transpose(0, 2, 1)) / 2


def _near(r: np.ndarray, eta: float, decay: float) -> np.ndarray:
    """[3, m] narrow Gaussians' part of the three interactions at distances r."""
    a, b = eta * r, decay / (2 * eta)
    exponential = np.exp(-decay * r) * erfc(a - b) - np.exp(-(a**2) - b**2) * erfcx(a + b)
    sixth = np.exp(-(a**2)) * (1 + a**2 + a**4 / 2) / r**6
    return np.stack([erfc(a) / r, sixth, exponential / 2])


def _far(g: np.ndarray, eta: float, decay: float, volume: float) -> np.ndarray:
    """[3, m] Fourier components of the wide Gaussians' part at wave numbers g, the first one 0."""
    b, c = g / (2 * eta), (decay**2 + g**2) / 4
    gauss = np.exp(-(b**2))
    inverse = np.full(len(g), -math.pi / eta**2)
    inverse[1:] = 4 * math.pi * gauss[1:] / g[1:] ** 2
    sixth = (1 - 2 * b**2) * gauss + 2 * math.sqrt(math.pi) * b**3 * erfc(b)
    sixth *= math.pi**1.5 * eta**3 / 3
    exponential = np.exp(-c / eta**2) * (1 / (c * eta**2) + 1 / c**2) * decay * math.pi / 2
    return np.stack([inverse, sixth, exponential]) / volume


def _itself(eta: float, decay: float) -> np.ndarray:
    """[3] what an atom's distance to itself adds: the wide Gaussians' part is taken out again where
    it must not count, the narrow ones' part added where it counts."""
    return np.array([-2 * eta / math.sqrt(math.pi), -(eta**6) / 6, erf(decay / (2 * eta))])


def _reciprocal(lattice: np.ndarray, longest: float) -> np.ndarray:
    """[m, 3] reciprocal vectors (with 2π) up to a length: zero first, then one of each pair."""
    most = np.floor(longest * np.linalg.norm(lattice, axis=1) / (2 * math.pi)).astype(int)
    index = np.indices(2 * most + 1).reshape(3, -1).T - most
    index = index[len(index) // 2 :]  # the middle is zero; behind it are the opposites
    vectors = 2 * math.pi * index @ np.linalg.inv(lattice).T
    return vectors[np.linalg.norm(vectors, axis=1) <= longest]
