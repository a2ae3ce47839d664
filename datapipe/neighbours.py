"""Geometry of one crystal that no mask changes: who is joined to whom, and how far atoms are.

All rules are masks over one symmetric list of pairs. The list is complete within its radius, so
an atom that has k entries inside it has its k nearest among them, whatever images they lie in:
this certificate replaces counting image shells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from pymatgen.optimization.neighbors import find_points_in_spheres

from datapipe.crystal import Crystal
from datapipe.schema import GraphSpec

CLOSEST = 0.15
"""Pairs closer than this (Å) are no edges."""

_MATFORMER_IMAGES = np.array(
    [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=np.int64
)
_PERIODIC = np.ones(3, dtype=np.int64)
_ROW_HASH = np.random.default_rng(92).integers(1 << 63, size=1 << 12, dtype=np.uint64) * 2 + 1


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Edges and distance rows of one crystal, small enough to be kept for every crystal.

    Letters: n atoms, e edges, u shells (distinct edge lengths), r distinct distance rows.
    Edges that join the same two atoms over the same distance are one edge with a count.
    """

    edges: np.ndarray
    """[4, e] unsigned: target, source, shell, count; sorted by target, then source, then shell."""
    distances: np.ndarray
    """[u] float32: mean length of each shell in Å, ascending."""
    pdd: np.ndarray
    """[r, k] float32: the distinct rows of k nearest distances in Å."""
    pdd_row: np.ndarray
    """[n] unsigned: row of `pdd` that belongs to each atom."""
    vectors: np.ndarray | None = None
    """[e, 3] float32: target minus source in Å, where the spec asks for it."""

    @property
    def num_atoms(self) -> int:
        return len(self.pdd_row)

    @property
    def num_edges(self) -> int:
        """Edges of the plain graph. The quotient has at most `edges.shape[1]`."""
        return int(self.edges[3].sum(dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.edges, self.distances, self.pdd, self.pdd_row, self.vectors)
        return sum(a.nbytes for a in arrays if a is not None)


def neighbours(crystal: Crystal, spec: GraphSpec) -> Neighbours:
    """Edges and distance rows of a crystal under a graph spec.

    The k-nearest rule is that of ComFormer and Matformer: an edge for every image of j within
    the k-th distance of i or of j. There an image of an atom in its own neighbour list stands in
    the edge set with both signs and each is emitted in both directions, so its count is doubled.
    Lattice edges go into the same set: an image that is a near neighbour already adds nothing.

    Distances within `spec.tie_tolerance` of each other are one class and get the mean of the
    class, edges and distance rows alike, so that equivalent atoms have equal inputs.

    Pairs closer than 0.15 Å are no edges and do not count among the k nearest; the distance
    rows (pointwise distance distribution) leave out the zero distance of an atom to itself only.
    """
    lattice, tolerance, n = crystal.lattice, spec.tie_tolerance, len(crystal)
    points = crystal.frac_coords @ lattice
    pairs = _Pairs.certified(points, lattice, spec)
    i, j, d = pairs.i, pairs.j, pairs.d

    reach = pairs.reach(spec)
    limit = reach + tolerance
    keep = np.flatnonzero((d >= CLOSEST) & (d <= np.maximum(limit[i], limit[j])))
    target, source, length = i[keep], j[keep], d[keep]
    count = np.ones(len(keep), dtype=np.int64)
    if spec.neighbors is not None:
        count += target == source
    vectors = (
        points[target] - points[source] - pairs.shift[keep] @ lattice if spec.vectors else None
    )

    if spec.lattice_edges != "none":
        images = _MATFORMER_IMAGES if spec.lattice_edges == "matformer" else lattice_triple(lattice)
        steps = images @ lattice
        far = np.linalg.norm(steps, axis=1) > limit[:, None]
        atom, image = np.nonzero(far)
        atom, step = np.repeat(atom, 2), np.repeat(steps[image], 2, axis=0)
        step[1::2] *= -1
        target, source = np.concatenate([target, atom]), np.concatenate([source, atom])
        length = np.concatenate([length, np.linalg.norm(step, axis=1)])
        count = np.concatenate([count, np.ones(len(atom), dtype=np.int64)])
        vectors = None if vectors is None else np.concatenate([vectors, step])

    shell, distances = cluster(length, tolerance)
    key = (target * n + source) * max(len(distances), 1) + shell
    order = np.argsort(key, kind="stable")
    key = key[order]
    if spec.vectors:
        count = count[order]
    else:
        first = np.flatnonzero(np.diff(key, prepend=-1))
        count = np.add.reduceat(count[order], first) if len(first) else count
        order = order[first]
    edges = _narrow(np.stack([target[order], source[order], shell[order], count]))

    rows, row_of_atom = pairs.rows(spec.pdd, tolerance)
    return Neighbours(
        edges=edges,
        distances=distances.astype(np.float32),
        pdd=rows.astype(np.float32),
        pdd_row=_narrow(row_of_atom),
        vectors=None if vectors is None else vectors[order].astype(np.float32),
    )


@dataclass(frozen=True)
class _Pairs:
    """All pairs (i, image of j) within a radius, each atom with itself among them, sorted by i
    and then by distance."""

    i: np.ndarray
    j: np.ndarray
    d: np.ndarray
    shift: np.ndarray
    ptr: np.ndarray

    @classmethod
    def certified(cls, points: np.ndarray, lattice: np.ndarray, spec: GraphSpec) -> _Pairs:
        """The pairs within a radius that provably holds all the spec needs."""
        nearest = max(spec.neighbors or 0, spec.pdd)
        volume = abs(np.linalg.det(lattice))
        # A ball of this radius holds 1.6 times as many atoms as needed on average.
        radius = (1.6 * max(nearest, 1) * volume / len(points) * 0.75 / math.pi) ** (1 / 3)
        if spec.radius is not None:
            radius = max(radius if spec.pdd else 0.0, spec.radius + 2 * spec.tie_tolerance)
        while True:
            pairs = cls._within(points, lattice, radius)
            sure = pairs.d <= radius - 2 * spec.tie_tolerance
            near = np.bincount(pairs.i[sure & (pairs.d >= CLOSEST)], minlength=len(points))
            if near.min() >= nearest:
                return pairs
            radius *= 1.2

    @classmethod
    def _within(cls, points: np.ndarray, lattice: np.ndarray, radius: float) -> _Pairs:
        i, j, shift, d = find_points_in_spheres(
            points, points, r=radius, pbc=_PERIODIC, lattice=lattice, tol=1e-8
        )
        order = np.argsort(i * (radius + 1) + d)
        ptr = np.concatenate([[0], np.cumsum(np.bincount(i, minlength=len(points)))])
        return cls(i[order], j[order], d[order], shift[order], ptr)

    def reach(self, spec: GraphSpec) -> np.ndarray:
        """[n] distance in Å up to which each atom's own list of neighbours goes."""
        n = len(self.ptr) - 1
        if spec.radius is not None:
            return np.full(n, spec.radius)
        assert spec.neighbors is not None
        ignored = np.bincount(self.i[self.d < CLOSEST], minlength=n)
        return self.d[self.ptr[:-1] + ignored + spec.neighbors - 1]

    def rows(self, k: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        """Distinct rows [r, k] of nearest distances and the row of each atom [n]."""
        n = len(self.ptr) - 1
        if k == 0:
            return np.zeros((1, 0)), np.zeros(n, dtype=np.int64)
        # An atom itself is the first of its pairs, at distance zero.
        place = self.ptr[:-1, None] + np.arange(1, k + 1)
        ids, means = cluster(self.d[place].ravel(), tolerance)
        ids = ids.reshape(n, k)
        digest = (ids.astype(np.uint64) * _ROW_HASH[:k]).sum(axis=1)
        _, first, row_of_atom = np.unique(digest, return_index=True, return_inverse=True)
        return means[ids[first]], row_of_atom


def cluster(values: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Classes of equal numbers: ids [m] in ascending order of value, and the mean of each class.

    Sorted numbers with gaps above the tolerance between them are different. A chain of small
    gaps that is wider than the tolerance is cut, so a class is never wider than the tolerance.
    """
    if len(values) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    order = np.argsort(values)
    ascending = values[order]
    gap = np.diff(ascending, prepend=ascending[0]) > tolerance
    chain = np.cumsum(gap)
    start = ascending[np.concatenate([[0], np.flatnonzero(gap)])]
    part = ((ascending - start[chain]) / tolerance).astype(np.int64)
    new = gap | (np.diff(part, prepend=0) != 0)
    ids = np.empty(len(values), dtype=np.int64)
    ids[order] = np.cumsum(new)
    return ids, np.bincount(ids, weights=values) / np.bincount(ids)


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


def _narrow(array: np.ndarray) -> np.ndarray:
    """The same whole numbers in the smallest unsigned type."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))
