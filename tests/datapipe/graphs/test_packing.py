"""Graphs against their definitions: explicit loops over images, and the recipe's literal sets."""

import itertools
import math

import numpy as np
import pytest
import torch

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build, neighbours, pack, unpack
from crysforge.datapipe.graphs.transforms import MaskAtoms, Sample
from crysforge.datapipe.schema import CrystalBatch, GraphSpec, concat
from tests.reference_graphs import by_pair, cell, lists_with, recipe

TOL = 1e-4


def random_crystal(seed: int, n: int, lengths=None, angles=None) -> Crystal:
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(3, 7, 3) if lengths is None else lengths
    angles = rng.uniform(60, 115, 3) if angles is None else angles
    return Crystal.create(
        str(seed), rng.integers(1, 90, n), rng.uniform(size=(n, 3)), cell(lengths, angles)
    )


CELLS = {
    "random": random_crystal(0, 5),
    "another": random_crystal(1, 7),
    "skewed": random_crystal(2, 3, (4, 5, 6), (20, 30, 40)),
    "flat angles": random_crystal(3, 3, (4, 5, 4), (100, 95, 160)),
    "sheared": random_crystal(4, 2, (3, 9, 4), (90, 90, 20)),
    "tiny": random_crystal(5, 1, (2, 2, 2), (90, 90, 90)),
    "tiny skewed": random_crystal(6, 1, (2, 2.3, 2.1), (60, 75, 50)),
    "huge": random_crystal(7, 2, (40, 38, 45), (90, 80, 100)),
    "elongated": random_crystal(8, 2, (2, 2.2, 60), (90, 85, 95)),
    "slab": random_crystal(9, 3, (3, 3, 30), (90, 90, 120)),
    "overlapping": Crystal.create(
        "o", [5, 6, 7], [[0, 0, 0], [0.02, 0, 0], [0.5, 0.5, 0.4]], 4 * np.eye(3)
    ),
}
RULES = {
    "k=12": {"neighbors": 12},
    "k=3": {"neighbors": 3},
    "radius": {"radius": 4.5},
    "k=12, once": {"neighbors": 12, "own_images_once": True},
    "matformer, once": {"neighbors": 9, "lattice_edges": "matformer", "own_images_once": True},
    "matformer": {"neighbors": 12, "lattice_edges": "matformer"},
    "matformer, few": {"neighbors": 2, "lattice_edges": "matformer"},
    "comformer": {"neighbors": 9, "lattice_edges": "comformer"},
    "radius, lattice": {"radius": 3.0, "lattice_edges": "matformer"},
}


def lengths_by_pair(batch: CrystalBatch) -> dict[tuple[int, int], np.ndarray]:
    source, target = batch.edge_index.tolist()
    found = by_pair(source, target, batch.edge_distance.numpy())
    return {pair: np.sort(v) for pair, v in found.items()}


def assert_same_lengths(found, expected, atol=TOL):
    assert found.keys() == expected.keys()
    for pair, lengths in expected.items():
        assert len(found[pair]) == len(lengths), pair
        np.testing.assert_allclose(found[pair], lengths, atol=atol, err_msg=str(pair))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CELLS)
def test_edges_are_those_of_the_recipe(name, rule):
    crystal, spec = CELLS[name], GraphSpec(**RULES[rule])
    batch = build([crystal], spec)
    expected = recipe(crystal, spec)
    lengths = by_pair(
        [e[0] for e in expected],
        [e[1] for e in expected],
        [np.linalg.norm(e[2]) for e in expected],
    )
    assert_same_lengths(lengths_by_pair(batch), {pair: np.sort(v) for pair, v in lengths.items()})
    assert (batch.edge_multiplicity == 1).all()
    assert neighbours(crystal, spec).num_edges == len(expected) == batch.num_edges


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["random", "skewed", "tiny", "elongated"])
def test_vectors_are_those_of_the_recipe(name, rule):
    crystal, spec = CELLS[name], GraphSpec(**RULES[rule], vectors=True)
    batch = build([crystal], spec)
    expected = by_pair(*zip(*recipe(crystal, spec), strict=True))
    source, target = batch.edge_index.tolist()
    found = by_pair(source, target, batch.edge_vector.numpy())
    assert found.keys() == expected.keys()
    for pair, vectors in expected.items():
        apart = np.linalg.norm(found[pair][:, None] - vectors[None], axis=-1) < TOL
        # As multisets: every vector is there as often as it should be.
        np.testing.assert_array_equal(
            apart.sum(axis=0), (np.linalg.norm(vectors[:, None] - vectors, axis=-1) < TOL).sum(0)
        )
        assert len(found[pair]) == len(vectors)
    length = batch.edge_vector.norm(dim=1)
    torch.testing.assert_close(length, batch.edge_distance, atol=TOL, rtol=0)


def test_lattice_edges_count_what_the_set_leaves():
    """Simple cubic, 6 neighbours: ±a, ±b, ±c are near and stand in the set with both signs, so
    each is there twice; the pair sums are added once and emitted in both directions."""
    crystal = Crystal.create("sc", [84], np.zeros((1, 3)), 3 * np.eye(3))
    spec = {"neighbors": 6, "lattice_edges": "matformer"}
    plain = build([crystal], GraphSpec(**spec))
    assert plain.num_edges == 12 + 6
    quotient = build([crystal], GraphSpec(**spec, depth=3))
    assert quotient.edge_multiplicity.tolist() == [12, 6]
    np.testing.assert_allclose(quotient.edge_distance, [3, 3 * math.sqrt(2)], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 12, 92])
@pytest.mark.parametrize("name", CELLS)
def test_pdd_rows_are_the_nearest_distances(name, k):
    crystal = CELLS[name]
    batch = build([crystal], GraphSpec(neighbors=2, pdd=k))
    lists = lists_with(crystal, k, 0)
    expected = np.array([[e[0] for e in entries[:k]] for entries in lists])
    np.testing.assert_allclose(batch.pdd[:, 1:], expected, atol=TOL)
    assert (batch.pdd[:, 1:].diff(dim=1) >= 0).all()
    share = crystal.numbers / crystal.numbers.sum(dtype=float)
    np.testing.assert_allclose(batch.pdd[:, 0], share, rtol=1e-6)


def test_masked_atoms_have_no_share():
    crystal = random_crystal(3, 4)
    spec = GraphSpec(neighbors=4, pdd=5, depth=2)
    masked = np.array([True, False, False, True])
    batch = build([Sample(crystal, 1, masked, crystal)], spec, quotient=False)
    z = np.where(masked, 0, crystal.numbers)
    np.testing.assert_allclose(batch.pdd[:, 0], z / z.sum(), rtol=1e-6)
    assert batch.node_numbers.tolist() == z.tolist()
    assert batch.numbers.tolist() == crystal.numbers.tolist()
    nothing = build([Sample(crystal, 1, np.ones(4, dtype=bool), crystal)], spec, quotient=False)
    assert (nothing.pdd[:, 0] == 0).all() and (nothing.node_numbers == 0).all()


MOVES = ["rotation", "translation", "permutation", "basis", "read-only"]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", ["another", "skewed", "tiny skewed", "elongated"])
def test_a_moved_crystal_has_the_same_graph(name, move):
    crystal = CELLS[name]
    rng = np.random.default_rng(5)
    n = len(crystal)
    order, lattice, frac = np.arange(n), crystal.lattice, crystal.frac_coords
    if move == "rotation":
        lattice = lattice @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    elif move == "translation":
        frac = (frac + rng.uniform(-3, 3, size=3)) % 1.0
    elif move == "permutation":
        order = rng.permutation(n)
        frac = frac[order]
    elif move == "basis":
        change = np.array([[1, 1, 0], [0, 1, 0], [0, -1, 1]])
        lattice, frac = change @ lattice, (frac @ np.linalg.inv(change)) % 1.0
    else:
        lattice = np.asfortranarray(lattice)
        lattice.flags.writeable = frac.flags.writeable = False
    moved = Crystal("m", crystal.numbers[order], frac, lattice)
    spec = GraphSpec(neighbors=12, pdd=40, lattice_edges="comformer")
    before, after = build([crystal], spec), build([moved], spec)
    torch.testing.assert_close(after.pdd, before.pdd[order], atol=TOL, rtol=0)
    place = np.argsort(order)
    expected = {(int(place[s]), int(place[t])): v for (s, t), v in lengths_by_pair(before).items()}
    assert_same_lengths(lengths_by_pair(after), expected)


PERFECT = {
    "rock salt": (
        [11] * 4 + [17] * 4,
        np.array(list(itertools.product([0, 1], repeat=3)))[[0, 3, 5, 6, 7, 4, 2, 1]] / 2,
        5.64 * np.eye(3),
    ),
    "rock salt, primitive": (
        [11, 17],
        [[0, 0, 0], [0.5, 0.5, 0.5]],
        2.82 * (np.ones((3, 3)) - np.eye(3)),
    ),
    "fcc": ([29], [[0, 0, 0]], 1.805 * (np.ones((3, 3)) - np.eye(3))),
    "hcp": (
        [12, 12],
        [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]],
        cell((3.2, 3.2, 5.2), (90, 90, 120)),
    ),
}


@pytest.mark.parametrize(
    "rule", [{"neighbors": k, "pdd": 30} for k in (1, 4, 12, 25)] + [{"radius": 0}]
)
@pytest.mark.parametrize("name", PERFECT)
def test_noise_does_not_decide_ties(name, rule):
    numbers, frac, lattice = PERFECT[name]
    rng = np.random.default_rng(0)
    crystal = Crystal.create("x", numbers, frac, lattice)
    if "radius" in rule:  # the nearest distance to within the tolerance, from below
        rule = {"radius": build([crystal], SPECS["pddformer"]).distances[0].item() - 5e-5}
    spec = GraphSpec(**rule, depth=3)
    exact = build([crystal], spec)
    assert exact.num_edges > 0
    for _ in range(5):
        noisy = Crystal(
            "x",
            np.array(numbers, dtype=np.uint8),
            np.array(frac) + rng.normal(size=(len(frac), 3)) * 1e-9,
            lattice + rng.normal(size=(3, 3)) * 1e-9,
        )
        other = build([noisy], spec)
        assert exact.num_nodes == other.num_nodes == len(set(numbers))
        for field in ("edge_index", "edge_multiplicity", "edge_distance_row", "node_of_atom"):
            assert torch.equal(getattr(exact, field), getattr(other, field)), field
        torch.testing.assert_close(exact.pdd, other.pdd, atol=1e-6, rtol=0)
        assert neighbours(noisy, spec).num_edges == build([noisy], spec, quotient=False).num_edges


@pytest.mark.parametrize("rule", [{"neighbors": 2}, {"neighbors": 8, "pdd": 12}])
def test_start_radius_has_no_influence(rule, monkeypatch):
    """Not even where it falls among distances that are equal within the tolerance."""
    spec = GraphSpec(**rule, lattice_edges="matformer")
    rng = np.random.default_rng(0)
    frac = np.array(PERFECT["rock salt"][1]) + rng.uniform(-3e-6, 3e-6, size=(8, 3))
    crystal = Crystal.create("x", PERFECT["rock salt"][0], frac, PERFECT["rock salt"][2])
    expected = neighbours(crystal, spec)
    kth = np.unique(neighbours(crystal, GraphSpec(neighbors=1, pdd=18)).pdd)
    for radius in [1.0, 9.0, *(d + e for d in kth for e in (-3e-5, -1e-5, 0.0, 1e-5, 3e-5))]:
        monkeypatch.setattr(
            "crysforge.datapipe.graphs.neighbours.start_radius", lambda *_, r=float(radius): r
        )
        found = neighbours(crystal, spec)
        np.testing.assert_array_equal(found.edges, expected.edges)
        np.testing.assert_allclose(found.distances, expected.distances, atol=1e-6)
        np.testing.assert_array_equal(found.pdd[found.pdd_row], expected.pdd[expected.pdd_row])


def test_isolated_atom_has_no_edges():
    alone = Crystal.create("a", [2], [[0.3, 0.3, 0.3]], 10 * np.eye(3))
    spec = GraphSpec(radius=4.0, pdd=6, depth=2)
    for quotient in (True, False):
        batch = build([alone, random_crystal(0, 3), alone], spec, quotient=quotient)
        assert batch.edge_ptr[1] == 0 and batch.edge_ptr[-2] == batch.edge_ptr[-1]
        np.testing.assert_allclose(batch.pdd[0, 1:], 10, rtol=1e-6)
        empty = build([alone], spec, quotient=quotient)
        assert empty.edge_index.shape == (2, 0) and empty.edge_ptr.tolist() == [0, 0]
        assert len(empty.distances) == len(empty.edge_multiplicity) == 0
    vectors = build([alone], GraphSpec(radius=4.0, vectors=True))
    assert vectors.edge_vector.shape == (0, 3)


SPECS = {
    "pddformer": GraphSpec(neighbors=25, pdd=92, depth=4),
    "matformer": GraphSpec(neighbors=12, lattice_edges="matformer", depth=5),
    "vectors": GraphSpec(radius=4.0, vectors=True),
}


def some_samples(count: int, ratio: float = 0.3) -> list[Sample]:
    crystals = [random_crystal(i, 1 + i % 6).with_targets({"gap": i / 3}) for i in range(count)]
    crystals[2:2] = [Crystal.create(name, *PERFECT[name]) for name in PERFECT]
    mask = MaskAtoms(ratio)
    return [
        mask.on_crystal(Sample.clean(c, 71 * i), np.random.default_rng(i))
        for i, c in enumerate(crystals)
    ]


def assert_equal_batches(a: CrystalBatch, b: CrystalBatch, steps: int = 0):
    """Equal to the last bit, or but for a few float32 steps."""
    rtol = steps * torch.finfo(torch.float32).eps
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype, name
            torch.testing.assert_close(value, other, rtol=rtol, atol=0, equal_nan=True, msg=name)
        elif isinstance(value, dict):
            assert value.keys() == other.keys()
            for key in value:
                torch.testing.assert_close(value[key], other[key], equal_nan=True)
        else:
            assert value == other, name


@pytest.mark.parametrize("quotient", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_packing_together_is_concatenation(name, quotient):
    samples, spec = some_samples(9), SPECS[name]
    geometry = [neighbours(s.seen, spec) for s in samples]
    together = pack(samples, geometry, spec, ["gap", "none"], quotient)
    for cuts in ([0, 5, 13], [0, 1, 2, 3, 13]):
        parts = [
            pack(samples[a:b], geometry[a:b], spec, ["gap", "none"], quotient)
            for a, b in itertools.pairwise(cuts)
        ]
        assert_equal_batches(concat(parts), together)


@pytest.mark.parametrize("quotient", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_batch_is_well_formed(name, quotient):
    spec, samples = SPECS[name], some_samples(9)
    batch = build(samples, spec, ["gap"], quotient)
    source, target = batch.edge_index
    assert (target.diff() >= 0).all()
    assert torch.equal(
        batch.edge_ptr, torch.searchsorted(target, torch.arange(batch.num_nodes + 1))
    )
    assert torch.equal(batch.node_batch[source], batch.node_batch[target])
    assert torch.equal(batch.node_batch[batch.node_of_atom], batch.batch)
    assert torch.equal(batch.node_multiplicity.long(), batch.node_of_atom.bincount())
    assert torch.equal(batch.node_ptr[1:] - batch.node_ptr[:-1], batch.node_batch.bincount())
    assert torch.equal(batch.node_numbers[batch.node_of_atom], batch.numbers * ~batch.masked)
    assert torch.equal(batch.edge_distance_row.unique(), torch.arange(len(batch.distances)))
    assert batch.ids == [s.crystal.id for s in samples]
    np.testing.assert_allclose(
        batch.targets["gap"], [s.crystal.targets.get("gap", np.nan) for s in samples], rtol=1e-6
    )
    # Every edge has its reverse: the length sums of both directions agree, pair by pair.
    weight = batch.edge_multiplicity * batch.node_multiplicity[target]
    flow = torch.zeros(batch.num_nodes, batch.num_nodes, dtype=torch.float64)
    flow.index_put_((source, target), (weight * batch.edge_distance).double(), accumulate=True)
    torch.testing.assert_close(flow, flow.T, rtol=1e-6, atol=1e-6)
    # Shares of a crystal's visible atoms sum to one.
    if spec.pdd:
        share = torch.zeros(batch.num_crystals).index_add(
            0, batch.node_batch, batch.pdd[:, 0] * batch.node_multiplicity
        )
        visible = torch.zeros(batch.num_crystals).index_add(0, batch.batch, (~batch.masked).float())
        torch.testing.assert_close(share, (visible > 0).float())


def test_node_keys_follow_crystal_keys_alone():
    crystal, spec = random_crystal(1, 6), SPECS["pddformer"]
    first = build([Sample.clean(crystal, 5)], spec).node_rng_key
    later = build(
        [Sample.clean(random_crystal(2, 4), 9), Sample.clean(crystal, 5)], spec
    ).node_rng_key
    assert torch.equal(first, later[-len(first) :])
    assert len(set(later.tolist())) == len(later)
    assert not torch.isin(build([Sample.clean(crystal, 6)], spec).node_rng_key, first).any()


def test_targets_are_clean_and_the_graph_is_what_is_seen():
    crystal = random_crystal(1, 4)
    moved = Crystal.create(
        "moved",
        crystal.numbers[::-1],
        crystal.frac_coords + 0.07 * np.eye(4, 3),
        crystal.lattice * 1.1,
    )
    spec = GraphSpec(neighbors=6, pdd=4, depth=2)
    batch = build([Sample(crystal, 0, np.zeros(4, dtype=bool), moved)], spec)
    assert batch.numbers.tolist() == crystal.numbers.tolist()
    assert batch.node_numbers.tolist() == moved.numbers.tolist()
    np.testing.assert_allclose(batch.frac_coords, crystal.frac_coords, atol=1e-7)
    np.testing.assert_allclose(batch.lattice[0], crystal.lattice, rtol=1e-6)
    plain = build([moved], spec)
    assert torch.equal(batch.pdd, plain.pdd) and torch.equal(batch.distances, plain.distances)


def test_geometry_is_compact():
    """Cached geometry holds edges between the same atoms over the same distance once, and small
    whole numbers in small types."""
    crystal = Crystal.create("fcc", *PERFECT["fcc"])
    geometry = neighbours(crystal, SPECS["pddformer"])
    assert geometry.edges.shape[1] < 5 and geometry.num_edges > 25
    assert geometry.edges.dtype == np.uint8 and geometry.pdd.shape == (1, 92)
    assert geometry.nbytes < 500


def test_bad_input_is_named():
    for wrong in (
        {},
        {"neighbors": 0},
        {"neighbors": 2, "pdd": -1},
        {"neighbors": 3, "radius": 2.0},
    ):
        with pytest.raises(ValueError, match="GraphSpec"):
            GraphSpec(**wrong)
    with pytest.raises(ValueError, match="none, matformer or comformer"):
        GraphSpec(neighbors=3, lattice_edges="matfomer")
    crystal, spec = random_crystal(0, 3), SPECS["matformer"]
    with pytest.raises(ValueError, match="at least one crystal"):
        build([], spec)
    with pytest.raises(ValueError, match="numbers of atoms differ"):
        pack([Sample.clean(crystal)], [neighbours(random_crystal(0, 4), spec)], spec)


@pytest.mark.parametrize("quotient", [True, False])
def test_unpack_is_the_inverse_of_pack(quotient):
    crystals = [s.crystal for s in some_samples(7)]
    batch = build(crystals, SPECS["pddformer"], ["gap"], quotient)
    parts = unpack(batch)
    assert [c.id for c in parts] == [c.id for c in crystals]
    for ours, given in zip(parts, crystals, strict=True):
        assert np.array_equal(ours.numbers, given.numbers)
        away = ours.frac_coords - given.frac_coords
        np.testing.assert_allclose(away - np.rint(away), 0, atol=1e-6)
        np.testing.assert_allclose(ours.lattice, given.lattice, atol=1e-5)
        np.testing.assert_allclose(ours.targets["gap"], given.targets.get("gap", np.nan), rtol=1e-6)
    assert_equal_batches(build(parts, SPECS["pddformer"], ["gap"], quotient), batch, steps=2)
