"""Which pairs of atoms are edges: neighbour rules and lattice edges, as masks over a list."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CLOSEST = 0.15
"""Pairs closer than this (Å) are no edges."""


class DirectedEdges(NamedTuple):
    """Directed edges of a crystal, a field per property."""

    target: np.ndarray
    source: np.ndarray
    length: np.ndarray
    """[e] Å."""
    vector: np.ndarray
    """[e, 3] target minus source in Å."""
    multiplicity: np.ndarray

    def with_more(self, other: DirectedEdges) -> DirectedEdges:
        """These, then the others."""
        return DirectedEdges(*(np.concatenate(both) for both in zip(self, other, strict=True)))


class PairList(NamedTuple):
    """Pairs (i, image of j) of atoms at Cartesian `points` [n, 3] in Å; a pair's other direction is
    in the list too, but for rounding at its end."""

    i: np.ndarray
    j: np.ndarray
    image: np.ndarray
    """[pairs, 3] image of j in lattice vectors."""
    points: np.ndarray
    lattice: np.ndarray

    def vectors(self, keep: np.ndarray) -> np.ndarray:
        """[m, 3] target minus source in Å of some pairs, whose target is i."""
        i, j = self.i[keep], self.j[keep]
        return self.points[i] - self.points[j] - self.image[keep] @ self.lattice


def near_edges(pairs: PairList, d: np.ndarray, limit: np.ndarray, doubled: bool) -> DirectedEdges:
    """Edges of the neighbour rule: pairs within the limit of either end.

    Args:
        d: [pairs] lengths in Å. limit: [n] Å.
        doubled: whether an edge to an own image counts twice.
    """
    keep = np.flatnonzero((d >= CLOSEST) & (d <= np.maximum(limit[pairs.i], limit[pairs.j])))
    i, j = pairs.i[keep], pairs.j[keep]
    count = 1 + (i == j) if doubled else np.ones(len(i), dtype=np.int64)
    return DirectedEdges(i, j, d[keep], pairs.vectors(keep), count)


def lattice_edges(steps: np.ndarray, limit: np.ndarray) -> DirectedEdges:
    """Both directions of the steps [m, 3] at every atom, but for those within the atom's limit:
    the neighbour rule has them."""
    atom, step = np.nonzero(np.linalg.norm(steps, axis=1) > limit[:, None])
    return _both_ways(atom, step, steps)


def _both_ways(atom: np.ndarray, step: np.ndarray, steps: np.ndarray) -> DirectedEdges:
    length = np.linalg.norm(steps, axis=1)
    atom, step = np.concatenate([atom, atom]), np.concatenate([step, step + len(steps)])
    vector, length = np.concatenate([steps, -steps]), np.concatenate([length, length])
    return DirectedEdges(atom, atom, length[step], vector[step], np.ones(len(atom), dtype=np.int64))


def cut_edges(pairs: PairList, k: int, images: np.ndarray, doubled: bool) -> DirectedEdges:
    """Edges of the k-nearest rule with its ties cut, as the released codes of Matformer, ComFormer
    and CrysLDNet make them: `length <= k-th length` in float64, so that rounding decides which of
    several equal neighbours are edges. The number of edges changes when the crystal is turned.

    Lengths are summed up in the order of jarvis-tools' `get_all_neighbors`, which those codes call.

    Args:
        images: [m, 3] images of an atom that it is joined to beside its neighbours.
        doubled: whether an edge to an own image counts twice.
    """
    i, j, n = pairs.i, pairs.j, len(pairs.points)
    d = _lengths(pairs)
    own = (d > CLOSEST) & (d <= _kth(i, d, n, k)[i])
    width = 2 * int(max(np.abs(pairs.image).max(initial=0), np.abs(images).max(initial=0))) + 1
    code, back = _code(i, j, pairs.image, n, width), _code(j, i, -pairs.image, n, width)
    order = np.argsort(code)
    alone = np.repeat(np.arange(n), len(images))
    wanted = _code(alone, alone, np.tile(images, (n, 1)), n, width)
    own |= np.isin(code, wanted)
    place = np.searchsorted(code, back, sorter=order).clip(max=max(len(code) - 1, 0))
    found = order[place]
    other = own[found] & (code[found] == back)
    count = np.where(i == j, own.astype(np.int64) + other, own | other)
    keep = np.flatnonzero(count)
    count = count[keep] if doubled else np.ones(len(keep), dtype=np.int64)
    edges = DirectedEdges(i[keep], j[keep], d[keep], pairs.vectors(keep), count)
    atom, step = np.nonzero(~np.isin(wanted, code).reshape(n, len(images)))  # too far for the list
    return edges.with_more(_both_ways(atom, step, images @ pairs.lattice))


def _lengths(pairs: PairList) -> np.ndarray:
    """[pairs] Å."""
    images, of_pair = np.unique(pairs.image, axis=0, return_inverse=True)
    shifts = np.stack([np.dot(image, pairs.lattice) for image in images.astype(np.float64)])
    step = shifts[of_pair.ravel()] + pairs.points[pairs.j] - pairs.points[pairs.i]
    return np.sum(step**2, axis=-1) ** 0.5


def _kth(i: np.ndarray, d: np.ndarray, n: int, k: int) -> np.ndarray:
    """[n] k-th length of each atom's neighbours."""
    near = np.flatnonzero(d > CLOSEST)
    order = near[np.lexsort([d[near], i[near]])]
    first = np.searchsorted(i[order], np.arange(n))
    return d[order][first + k - 1]


def _code(i: np.ndarray, j: np.ndarray, image: np.ndarray, n: int, width: int) -> np.ndarray:
    """A number for each (i, j, image)."""
    code = i.astype(np.int64) * n + j
    for column in np.asarray(image, dtype=np.int64).T:
        code = code * width + column + width // 2
    return code
