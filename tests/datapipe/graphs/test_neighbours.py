"""Distances that are equal within a tolerance, ties that are kept or cut, and the shortest vectors
of a lattice."""

import numpy as np
import pytest

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.datapipe.graphs.lattice_vectors import lattice_triple
from crysforge.datapipe.graphs.neighbours import cluster, neighbours
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.stored import graph_key
from crysforge.datapipe.schema import GraphSpec
from tests.reference_graphs import by_pair, cell, released

TOL = 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_clusters_stay_within_the_tolerance(seed):
    rng = np.random.default_rng(seed)
    centres = rng.uniform(1, 8, size=40)
    values = np.concatenate(
        [
            (centres[:, None] + rng.uniform(-1e-7, 1e-7, size=(40, 5))).ravel(),
            rng.uniform(2, 2.01, size=300),  # a chain of gaps below the tolerance
        ]
    )
    rng.shuffle(values)
    ids, means = cluster(values, TOL)
    assert np.abs(values - means[ids]).max() <= TOL
    assert (np.diff(means) > 0).all() and set(ids) == set(range(len(means)))
    ascending = ids[np.argsort(values)]
    assert (np.diff(ascending) >= 0).all()
    for centre in centres[(centres < 1.99) | (centres > 2.02)]:
        assert len(set(ids[np.abs(values - centre) < 1e-6])) == 1


REAL = [c for c in prototypes(size=200, seed=3) if len(c) <= 8][:100:4]
"""Crystals of real structure types, most of whose neighbours come in shells."""
MATFORMER = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]


def pairs_of(graph):
    target, source, _, count = graph.edges.astype(int)
    return by_pair(*(np.repeat(x, count, axis=0) for x in (source, target, graph.vectors)))


@pytest.mark.parametrize(("k", "images"), [(25, ()), (12, MATFORMER)])
def test_cut_ties_are_the_released_rule_edge_by_edge(k, images):
    fewer = 0
    for crystal in REAL:
        lattice_edges = "matformer" if images else "none"
        spec = {"neighbors": k, "vectors": True, "lattice_edges": lattice_edges}
        cut = neighbours(crystal, GraphSpec(**spec, cut_ties=True))
        sources, targets, vectors = zip(*released(crystal, k, images), strict=True)
        want, found = by_pair(sources, targets, vectors), pairs_of(cut)
        assert found.keys() == want.keys()
        for pair, rows in want.items():
            a, b = (x[np.lexsort((x + 0.0).round(3).T)] for x in (rows, found[pair]))
            np.testing.assert_allclose(a, b, atol=1e-3, err_msg=f"{crystal.id} {pair}")
        kept = neighbours(crystal, GraphSpec(**spec))
        assert np.array_equal(kept.pdd, cut.pdd) and kept.num_edges >= cut.num_edges
        fewer += kept.num_edges > cut.num_edges
    assert fewer > 1


def test_cut_ties_change_when_a_crystal_is_turned_and_kept_ones_do_not():
    """Turned by exchanging the axes, so that the standard orientation is another one."""
    counts = {True: [], False: []}
    for crystal in REAL:
        for axes in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
            turned = Crystal.create(
                crystal.id, crystal.numbers, crystal.frac_coords[:, axes], crystal.lattice[axes]
            )
            for cut, found in counts.items():
                graph = neighbours(turned, GraphSpec(neighbors=25, cut_ties=cut))
                found.append(graph.num_edges)
    cut, kept = (np.array(counts[c]).reshape(-1, 3) for c in (True, False))
    assert (np.ptp(kept, axis=1) == 0).all()
    assert (np.ptp(cut, axis=1) > 0).sum() > 1


def test_a_graph_with_cut_ties_has_no_quotient_and_a_radius_has_none_to_cut():
    spec, atoms = {"neighbors": 12, "depth": 2}, sum(map(len, REAL))
    assert build(REAL, GraphSpec(**spec)).num_nodes < 0.9 * atoms
    assert build(REAL, GraphSpec(**spec, cut_ties=True)).num_nodes == atoms
    with pytest.raises(ValueError, match="a radius has no ties"):
        GraphSpec(radius=4.0, cut_ties=True)
    assert graph_key(GraphSpec(**spec)) != graph_key(GraphSpec(**spec, cut_ties=True))


def test_lattice_triple_is_independent_of_the_basis():
    lattice = cell((3.1, 4.2, 5.3), (81, 97, 104))
    expected = np.linalg.norm(lattice_triple(lattice) @ lattice, axis=1)
    for change in ([[1, 2, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [3, 1, 0], [-1, 1, 1]]):
        other = np.array(change) @ lattice
        triple = lattice_triple(other)
        np.testing.assert_allclose(np.linalg.norm(triple @ other, axis=1), expected, rtol=1e-9)
        assert abs(round(np.linalg.det(triple))) == 1
