"""Distances that are equal within a tolerance, and the shortest vectors of a lattice."""

import numpy as np
import pytest

from crysforge.datapipe.graphs.lattice_vectors import lattice_triple
from crysforge.datapipe.graphs.neighbours import cluster
from tests.reference_graphs import cell

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


def test_lattice_triple_is_independent_of_the_basis():
    lattice = cell((3.1, 4.2, 5.3), (81, 97, 104))
    expected = np.linalg.norm(lattice_triple(lattice) @ lattice, axis=1)
    for change in ([[1, 2, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [3, 1, 0], [-1, 1, 1]]):
        other = np.array(change) @ lattice
        triple = lattice_triple(other)
        np.testing.assert_allclose(np.linalg.norm(triple @ other, axis=1), expected, rtol=1e-9)
        assert abs(round(np.linalg.det(triple))) == 1
