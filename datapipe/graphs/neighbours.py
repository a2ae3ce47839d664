"""Geometry of one crystal that no mask changes: who is joined to whom, and how far atoms are.

All rules are masks over one symmetric list of pairs. The list is complete within its radius, so
an atom that has k entries inside it has its k nearest among them, whatever images they lie in:
this certificate replaces counting image shells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from pymatgen.optimization.neighbors import find_points_in_spheres

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS, PairBound, compact_cell
from crysforge.datapipe.graphs.edge_rules import (
    CLOSEST,
    DirectedEdges,
    PairList,
    cut_edges,
    lattice_edges,
    near_edges,
)
from crysforge.datapipe.graphs.lattice_sums import potnet_sums
from crysforge.datapipe.graphs.lattice_vectors import lattice_triple, signed_triple
from crysforge.datapipe.graphs.quotient import mix
from crysforge.datapipe.schema import GraphSpec

_LEAST_RADIUS = 1.0
"""Å. A search for nearest neighbours begins no lower."""

_MATFORMER_IMAGES = np.array(
    [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=np.int64
)
_PERIODIC = np.ones(3, dtype=np.int64)


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
    triple: np.ndarray | None = None
    """[3, 3] float32: rows are the invariant lattice vectors in Å, where the spec asks for them."""
    pair_sums: np.ndarray | None = None
    """[s] float32: distinct lattice sums of pairs of atoms, where the spec asks for them."""
    pair_row: np.ndarray | None = None
    """[n, n] unsigned: row of `pair_sums` that belongs to each pair."""

    @property
    def num_atoms(self) -> int:
        return len(self.pdd_row)

    @property
    def num_edges(self) -> int:
        """Edges of the plain graph, those that stand for pairs of atoms too."""
        pairs = 0 if self.pair_row is None else self.pair_row.size
        return int(self.edges[3].sum(dtype=np.int64)) + pairs

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in vars(self).values() if a is not None)

    def with_pairs(self) -> Neighbours:
        """The same, with the pairs of atoms among the edges: their rows of `distances` are infinite
        and come last. Without `pair_sums` nothing changes."""
        if self.pair_sums is None or self.pair_row is None:
            return self
        n = self.num_atoms
        target, source = np.divmod(np.arange(n * n), n)
        row = self.pair_row.ravel() + len(self.distances)
        pairs = np.stack([target, source, row, np.ones(n * n, dtype=np.int64)])
        edges = np.concatenate([self.edges.astype(np.int64), pairs], axis=1)
        distances = [self.distances, np.full(len(self.pair_sums), np.inf, dtype=np.float32)]
        return replace(
            self,
            edges=edges[:, np.argsort(edges[0], kind="stable")],
            distances=np.concatenate(distances),
            pair_sums=np.concatenate([np.zeros_like(self.distances), self.pair_sums]),
            pair_row=None,
        )


def neighbours(crystal: Crystal, spec: GraphSpec, max_pairs: int = MAX_PAIRS) -> Neighbours:
    """Edges and distance rows of a crystal under a graph spec.

    Args:
        max_pairs: pairs of atoms, or images of atoms, that the search may look at.

    Raises:
        BadCrystal: it would have to look at more.

    The k-nearest rule is that of ComFormer and Matformer: an edge for every image of j within
    the k-th distance of i or of j. There an image of an atom in its own neighbour list stands in
    the edge set with both signs and each is emitted in both directions, so its count is doubled,
    unless the spec has it once. Neighbours that tie with the k-th are all edges, or cut by rounding
    where the spec says so (`edge_rules.cut_edges`).
    Lattice edges go into the same set: an image that is a near neighbour already adds nothing.

    Distances within `spec.tie_tolerance` of each other are one class and get the mean of the
    class, edges and distance rows alike, so that equivalent atoms have equal inputs.

    Pairs closer than 0.15 Å are no edges and do not count among the k nearest; the distance
    rows (pointwise distance distribution) leave out the zero distance of an atom to itself only.
    """
    lattice, tolerance = np.ascontiguousarray(crystal.lattice), spec.tie_tolerance
    points = crystal.frac_coords @ lattice
    pairs = _Pairs.certified(points, lattice, spec, max_pairs)
    edges = _edges(pairs, points, lattice, spec)
    rows, row_of_atom = pairs.pdd(spec.pdd, tolerance)
    shell, distances = cluster(edges.length, tolerance)

    n, shells = len(points), max(len(distances), 1)
    sums = sum_of_pair = None
    if spec.pair_sums != "none":
        if n * n > max_pairs:
            raise BadCrystal(
                f"its {n} atoms make {n * n} pairs, more than max_pairs={max_pairs}",
                "too many pairs",
            )
        pairwise = potnet_sums(points, lattice, scaled=spec.pair_sums == "scaled")
        ids, sums = cluster(pairwise.ravel(), tolerance)
        sums, sum_of_pair = sums.astype(np.float32), _narrow(ids.reshape(n, n))
    key = (edges.target * n + edges.source) * shells + shell
    order = np.argsort(key, kind="stable")
    count = edges.multiplicity[order]
    if not spec.vectors and len(order):
        first = np.flatnonzero(np.diff(key[order], prepend=-1))
        order, count = order[first], np.add.reduceat(count, first)
    return Neighbours(
        edges=_narrow(np.stack([edges.target[order], edges.source[order], shell[order], count])),
        distances=distances.astype(np.float32),
        pdd=rows.astype(np.float32),
        pdd_row=_narrow(row_of_atom),
        vectors=edges.vector[order].astype(np.float32) if spec.vectors else None,
        triple=signed_triple(lattice).astype(np.float32) if spec.lattice_triple else None,
        pair_sums=sums,
        pair_row=sum_of_pair,
    )


def _edges(
    pairs: _Pairs, points: np.ndarray, lattice: np.ndarray, spec: GraphSpec
) -> DirectedEdges:
    """Edges of the neighbour rule, then those to lattice images."""
    listed = PairList(pairs.i, pairs.j, pairs.image, points, lattice)
    doubled = spec.neighbors is not None and not spec.own_images_once
    images: np.ndarray = np.zeros((0, 3), dtype=np.int64)
    if spec.lattice_edges != "none":
        images = _MATFORMER_IMAGES if spec.lattice_edges == "matformer" else lattice_triple(lattice)
    if spec.cut_ties:
        assert spec.neighbors is not None
        return cut_edges(listed, spec.neighbors, images, doubled)
    limit = pairs.reach(spec) + spec.tie_tolerance
    edges = near_edges(listed, pairs.d, limit, doubled)
    return edges.with_more(lattice_edges(images @ lattice, limit))


@dataclass(frozen=True)
class _Pairs:
    """All pairs (i, image of j) within a radius, each atom with itself among them."""

    i: np.ndarray
    j: np.ndarray
    d: np.ndarray
    """[pairs] Å."""
    image: np.ndarray
    """[pairs, 3] image of j in lattice vectors."""
    rows: np.ndarray
    """[n, m] distances of each atom's pairs, ascending, infinity behind the last."""

    @classmethod
    def certified(
        cls,
        points: np.ndarray,
        lattice: np.ndarray,
        spec: GraphSpec,
        max_pairs: int,
        compact: bool = False,
    ) -> _Pairs:
        """The pairs within a radius that provably holds all the spec needs.

        Args:
            compact: whether this is the best cell to search in already.
        """
        nearest = max(spec.neighbors or 0, spec.pdd)
        least = _LEAST_RADIUS if spec.radius is None else spec.radius + 2 * spec.tie_tolerance
        radius = max(start_radius(nearest, len(points) / abs(np.linalg.det(lattice))), least)
        bound = PairBound(points, lattice, max_pairs)
        if bound.work(radius) > max_pairs // 8 and not compact:
            return cls._compact(points, lattice, spec, max_pairs)
        while bound.bins(radius) > max_pairs // 8:
            radius *= 1.5
        while radius > least and bound.work(radius) > max_pairs // 8 >= bound.bins(radius / 1.5):
            radius = max(radius / 1.5, least)  # the atoms are a cluster in an empty cell
        while True:
            bound.check(radius)
            pairs = cls.within(points, lattice, radius, max_pairs)
            sure = (pairs.rows >= CLOSEST) & (pairs.rows <= radius - 2 * spec.tie_tolerance)
            if sure.sum(axis=1).min() >= nearest:
                return pairs
            radius *= 1.2

    @classmethod
    def _compact(
        cls, points: np.ndarray, lattice: np.ndarray, spec: GraphSpec, max_pairs: int
    ) -> _Pairs:
        """`certified`, found in the cell in which least is looked at."""
        change, cell = compact_cell(points, lattice)
        basis = change @ lattice
        pairs = cls.certified(points - cell @ basis, basis, spec, max_pairs, compact=True)
        image = pairs.image + cell[pairs.i] - cell[pairs.j]
        return replace(pairs, image=image @ change)

    @classmethod
    def within(
        cls, points: np.ndarray, lattice: np.ndarray, radius: float, max_pairs: int
    ) -> _Pairs:
        """All pairs up to a radius in Å."""
        i, j, image, d = find_points_in_spheres(
            points, points, r=radius, pbc=_PERIODIC, lattice=lattice, tol=1e-8
        )
        size = np.bincount(i, minlength=len(points))[:, None]
        if size.size * int(size.max()) > max_pairs:
            raise BadCrystal(
                f"one of its {size.size} atoms has {size.max()} others within {radius:.3g} Å: more "
                f"than max_pairs={max_pairs} allows",
                "too many pairs",
            )
        place = np.arange(size.max()) < size
        rows = np.full(place.shape, np.inf)
        rows[place] = d[np.argsort(i, kind="stable")]
        rows.sort(axis=1)
        return cls(i, j, d, image, rows)

    def reach(self, spec: GraphSpec) -> np.ndarray:
        """[n] distance in Å up to which each atom's own list of neighbours goes."""
        n = len(self.rows)
        if spec.radius is not None:
            return np.full(n, spec.radius)
        assert spec.neighbors is not None
        ignored = (self.rows < CLOSEST).sum(axis=1)
        return self.rows[np.arange(n), ignored + spec.neighbors - 1]

    def pdd(self, k: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        """Distinct rows [r, k] of nearest distances and the row of each atom [n]."""
        n = len(self.rows)
        if k == 0:
            return np.zeros((1, 0)), np.zeros(n, dtype=np.int64)
        # An atom itself comes first, at distance zero.
        ids, means = cluster(self.rows[:, 1 : k + 1].ravel(), tolerance)
        ids = ids.reshape(n, k)
        digest = (ids.astype(np.uint64) * _odd_numbers(k)).sum(axis=1)
        _, first, row_of_atom = np.unique(digest, return_index=True, return_inverse=True)
        return means[ids[first]], row_of_atom


def start_radius(nearest: int, density: float) -> float:
    """First guess, in Å, of a radius that holds the `nearest` of every atom at a density in
    atoms/Å³: their ball with a surplus that goes with its surface. Enough for 19 of 20 real
    crystals; the search grows it for the rest. It has no influence on the graph."""
    wanted = nearest + 1.2 * nearest ** (2 / 3)
    return (wanted / density * 0.75 / math.pi) ** (1 / 3)


def cluster(values: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Classes of equal numbers: ids [m] in ascending order of value, and the mean of each class.

    Sorted numbers with a gap above the tolerance between them are different. A chain of smaller
    gaps is one class unless a member is further from its mean than the tolerance; then the chain
    is cut into parts as wide as the tolerance. So no number moves by more than the tolerance.
    """
    if len(values) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    order = np.argsort(values, kind="stable")  # quick on ascending runs
    ascending = values[order]
    new = np.ones(len(values), dtype=bool)
    np.greater(ascending[1:] - ascending[:-1], tolerance, out=new[1:])
    chain, means = _number(ascending, new)
    far = np.abs(ascending - means[chain]) > tolerance
    if far.any():
        wide = np.bincount(chain, weights=far)[chain] > 0
        part = ((ascending - ascending[new][chain]) / tolerance).astype(np.int64)
        new[1:] |= wide[1:] & (part[1:] != part[:-1])
        chain, means = _number(ascending, new)
    ids = np.empty(len(values), dtype=np.int64)
    ids[order] = chain
    return ids, means


def _number(ascending: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of consecutive classes, a new one wherever `new` is set, and the mean of each."""
    ids = np.cumsum(new) - 1
    return ids, np.bincount(ids, weights=ascending) / np.bincount(ids)


@cache
def _odd_numbers(k: int) -> np.ndarray:
    """[k] odd 64-bit multipliers that hash a row of class ids."""
    return mix(np.arange(k, dtype=np.uint64) + np.uint64(1)) | np.uint64(1)


def _narrow(array: np.ndarray) -> np.ndarray:
    """The same whole numbers in the smallest unsigned type."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))
