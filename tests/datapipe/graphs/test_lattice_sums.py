"""Sums over all images are those of their definition, whatever cell the crystal is given in."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from pymatgen.analysis.ewald import EwaldSummation
from pymatgen.core import Lattice, Structure

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.edge_transforms import DropEdges
from crysforge.datapipe.graphs.lattice_sums import lattice_sums, potnet_sums
from crysforge.datapipe.graphs.neighbours import neighbours
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.loading.config import estimate_edges
from crysforge.datapipe.schema import GraphSpec, concat
from tests.models.encoders.test_encoders import crystal, crystals

CELLS = {
    "cube": 4 * np.eye(3),
    "skewed": np.array([[3.1, 0, 0], [1.9, 3.4, 0], [-2.2, 1.3, 3.9]]),
    "flat": np.diag([3.0, 4.0, 14.0]),
    "left-handed": np.diag([4.0, 3.0, -5.0]),
}
each_cell = pytest.mark.parametrize("lattice", list(CELLS.values()), ids=list(CELLS))


def some_points(lattice: np.ndarray) -> np.ndarray:
    return np.array([[0, 0, 0], [0.3, 0.5, 0.9], [0.7, 0.1, 0.3], [0.5, 0.45, 0.4]]) @ lattice


def by_hand(f, points: np.ndarray, lattice: np.ndarray, cutoff: float, own: float) -> np.ndarray:
    """Σ f(r) over all images within the cutoff, `own` for an atom's distance to itself."""
    most = int(np.ceil(cutoff * np.linalg.norm(np.linalg.inv(lattice), axis=0).max())) + 1
    steps = np.array(list(itertools.product(range(-most, most + 1), repeat=3))) @ lattice
    out = np.empty((len(points), len(points)))
    for i, j in np.ndindex(out.shape):
        r = np.linalg.norm(points[i] - points[j] + steps, axis=1)
        zero = r < 1e-9
        out[i, j] = f(r[(r <= cutoff) & ~zero]).sum() + own * zero.sum()
    return out


@each_cell
@pytest.mark.parametrize("decay", [1.5, 3.0])
def test_exponentials_are_those_of_the_direct_sum(lattice, decay):
    points = some_points(lattice)
    expected = by_hand(lambda r: np.exp(-decay * r), points, lattice, 30 / decay, own=1.0)
    assert np.allclose(lattice_sums(points, lattice, decay)[2], expected, rtol=0, atol=1e-8)


@each_cell
def test_sixth_powers_are_those_of_the_direct_sum(lattice):
    points, cutoff = some_points(lattice), 30.0
    beyond = 4 * np.pi / (3 * abs(np.linalg.det(lattice)) * cutoff**3)
    expected = by_hand(lambda r: r**-6.0, points, lattice, cutoff, own=0.0) + beyond
    assert np.allclose(lattice_sums(points, lattice, 3.0)[1], expected, rtol=0, atol=2e-6)


@each_cell
def test_inverse_distances_are_those_of_neutral_charges(lattice):
    points = some_points(lattice)
    ours = lattice_sums(points, lattice, 3.0)[0]
    charges = np.array([1.7, -2.2, 0.9, -0.4])
    structure = Structure(
        Lattice(lattice), ["H"] * 4, points, coords_are_cartesian=True,
        site_properties={"charge": charges.tolist()},
    )  # fmt: skip
    ewald = EwaldSummation(structure, acc_factor=16)
    expected = ewald.total_energy / EwaldSummation.CONV_FACT
    assert charges @ ours @ charges / 2 == pytest.approx(expected, rel=1e-6)


@each_cell
def test_a_sum_is_that_of_the_atoms_of_a_supercell(lattice):
    """And scales with the length: together they fix what the background adds to 1/r."""
    points, decay = some_points(lattice), 2.0
    corners = np.array(list(itertools.product(range(2), repeat=3))) @ lattice
    many = (corners[:, None] + points).reshape(-1, 3)
    parts = lattice_sums(many, 2 * lattice, decay)[:, :4].reshape(3, 4, 8, 4)
    whole = lattice_sums(points, lattice, decay)
    assert np.allclose(parts.sum(axis=2), whole, rtol=0, atol=1e-8)
    longer = lattice_sums(1.7 * points, 1.7 * lattice, decay / 1.7)
    powers = np.array([1.7, 1.7**6, 1.0])[:, None, None]
    assert np.allclose(longer * powers, whole, rtol=0, atol=1e-8)


def test_known_constants_of_the_simple_cubic_lattice():
    inverse, sixth, _ = lattice_sums(np.zeros((1, 3)), np.eye(3), 3.0)[:, 0, 0]
    assert inverse == pytest.approx(-2.837297479, abs=1e-8)  # Wigner's, of a charge in a background
    assert sixth == pytest.approx(8.401923975, abs=1e-7)  # Lennard-Jones's and Ingham's


def test_neither_basis_nor_images_nor_order_change_a_sum():
    lattice = CELLS["skewed"]
    points, order = some_points(lattice), [2, 0, 3, 1]
    basis = np.array([[1, 0, 0], [1, 1, 0], [0, -2, 1]])
    moved = points + np.array([[1, 0, -2], [0, 3, 1], [-1, 0, 0], [2, 2, 2]]) @ lattice + [1, 2, 3]
    whole = potnet_sums(points, lattice, scaled=True)
    assert np.allclose(whole, whole.T, rtol=0, atol=1e-12)
    other = potnet_sums(moved[order], basis @ lattice, scaled=True)
    assert np.allclose(other, whole[order][:, order], rtol=0, atol=1e-8)


def test_the_repulsion_decays_as_released_or_as_written():
    lattice = 4 * np.eye(3)
    points = np.array([[0, 0, 0], [0.3, 0.5, 0.9]])
    for scaled, decay in ((True, 1.5), (False, 3.0)):
        inverse, sixth, exponential = lattice_sums(points, lattice, decay)
        expected = -0.801 * inverse - 0.074 * sixth + 0.145 * exponential
        assert np.allclose(potnet_sums(points, lattice, scaled), expected, rtol=0, atol=1e-12)


def test_atoms_on_top_of_each_other_have_finite_sums():
    for gap in (0.0, 1e-9, 1e-3):
        sums = potnet_sums(np.array([[0, 0, 0], [gap, 0, 0]]), 4 * np.eye(3), scaled=True)
        assert np.abs(sums).max() < 10


# In batches

SPEC = GraphSpec(neighbors=4, pair_sums="scaled")


def test_every_pair_of_atoms_has_an_edge_with_its_sum():
    batch = build(crystals(), SPEC)
    source, target = batch.edge_index
    pair = torch.isinf(batch.edge_distance)
    assert (target.diff() >= 0).all()
    assert (batch.pair_sums[batch.edge_distance_row[~pair]] == 0).all()
    plain = build(crystals(), dataclasses.replace(SPEC, pair_sums="none"))
    assert torch.equal(batch.edge_index[:, ~pair], plain.edge_index)
    assert torch.equal(batch.edge_distance[~pair], plain.edge_distance)
    values = batch.pair_sums[batch.edge_distance_row[pair]].numpy()
    first = batch.ptr.numpy()
    for c, start in zip(crystals(), first, strict=False):
        own = (target[pair] >= start) & (target[pair] < start + len(c))
        found = np.full((len(c), len(c)), np.nan)
        found[target[pair][own] - start, source[pair][own] - start] = values[own.numpy()]
        expected = potnet_sums(c.frac_coords @ c.lattice, c.lattice, scaled=True)
        assert np.allclose(found, expected, rtol=0, atol=1e-4)


def test_batches_with_pairs_are_joined_and_budgeted():
    whole = build(crystals(), SPEC)
    parts = concat([build(crystals()[:1], SPEC), build(crystals()[1:], SPEC)])
    for name in ("edge_index", "edge_distance_row", "distances", "pair_sums"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    c = crystal("irregular")
    graph = neighbours(c, SPEC)
    assert graph.num_edges == build([c], SPEC).num_edges
    atoms, volume = np.array([len(c)]), np.array([60.0])
    without = estimate_edges(dataclasses.replace(SPEC, pair_sums="none"), atoms, volume)
    assert estimate_edges(SPEC, atoms, volume) == without + 49


def test_dropped_edges_are_those_of_neighbours():
    c = crystal("irregular")
    whole, thinned = (build([c], SPEC, transform=transform) for transform in (None, DropEdges(1.0)))
    pairs = torch.isinf(whole.edge_distance)
    assert torch.equal(thinned.edge_index, whole.edge_index[:, pairs])


def test_specs_that_make_no_sense():
    with pytest.raises(ValueError, match="none, scaled or exact"):
        GraphSpec(neighbors=4, pair_sums="all")
    with pytest.raises(ValueError, match="has no vector"):
        GraphSpec(neighbors=4, pair_sums="exact", vectors=True)


def test_a_crystal_of_one_atom_has_the_pair_with_itself():
    c = Crystal.create("one", [29], [[0, 0, 0]], 3 * np.eye(3))
    batch = build([c], SPEC)
    assert torch.isinf(batch.edge_distance).sum() == 1
