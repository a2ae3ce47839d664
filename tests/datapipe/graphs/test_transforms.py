"""What stages do to crystals: how much, to whom, and that the graph follows."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.lattice import (
    from_log_metric,
    lattice_constants,
    log_metric,
    standard_lattice,
)
from crysforge.datapipe.crystals.symmetry import space_group
from crysforge.datapipe.graphs.edge_transforms import CountPairEdges, DropEdges, drop_edges
from crysforge.datapipe.graphs.neighbours import neighbours
from crysforge.datapipe.graphs.noise import (
    NoiseFractions,
    NoiseLattice,
    NoiseLatticeEntries,
    NoisePositions,
)
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import (
    Chain,
    Diffuse,
    MaskAtoms,
    Once,
    Sample,
    ShiftAtoms,
    SpaceGroup,
    Step,
    TwoViews,
)
from crysforge.datapipe.loading.config import LoaderConfig
from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.schema import GraphSpec, concat
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.models.objectives.diffusion import cosine_alpha_bar, wrapped_sigma
from tests.conftest import make_crystal

SPECS = {
    "quotient": GraphSpec(neighbors=8, pdd=4, depth=2),
    "self-edges": GraphSpec(neighbors=6, lattice_edges="matformer", depth=2),
    "vectors": GraphSpec(neighbors=8, vectors=True),
    "radius": GraphSpec(radius=5.0, vectors=True),
    "once": GraphSpec(neighbors=8, own_images_once=True, depth=2),
    "once, vectors": GraphSpec(neighbors=8, own_images_once=True, vectors=True),
}
SALT = Crystal.create("salt", [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], 3 * np.eye(3))


def draw(seed=0):
    return np.random.default_rng(seed)


def crystal_of(atoms, seed=0):
    return make_crystal(draw(seed), atoms)


def moved(sample):
    """Cartesian displacements of the atoms, the shortest ones, [n, 3] in Å."""
    step = sample.seen.frac_coords - sample.crystal.frac_coords
    steps = step[:, None] + np.array(list(itertools.product((-1, 0, 1), repeat=3)))
    cartesian = steps @ sample.seen.lattice
    nearest = np.linalg.norm(cartesian, axis=2).argmin(axis=1)
    return cartesian[np.arange(len(step)), nearest]


def test_positions_get_normal_noise_in_angstrom():
    crystal = crystal_of(400)
    sample = NoisePositions(0.2).on_crystal(Sample.clean(crystal), draw())
    noise = moved(sample)
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std(axis=0) == pytest.approx([0.2] * 3, rel=0.15)
    assert sample.crystal is crystal
    assert np.array_equal(sample.seen.lattice, crystal.lattice)
    assert sample.seen.frac_coords.min() >= 0 and sample.seen.frac_coords.max() < 1


def test_atoms_are_shifted_by_a_uniform_distance():
    distance = np.linalg.norm(
        moved(ShiftAtoms(0.05).on_crystal(Sample.clean(crystal_of(400)), draw())), axis=1
    )
    assert distance.max() < 0.05 + 1e-6
    assert np.quantile(distance, [0.25, 0.75]) == pytest.approx([0.0125, 0.0375], abs=0.005)


def test_lattice_noise_is_on_the_six_constants():
    crystal = crystal_of(30)
    clean = lattice_constants(crystal.lattice)
    samples = [NoiseLattice(0.1).on_crystal(Sample.clean(crystal), draw(i)) for i in range(300)]
    noise = np.array([lattice_constants(s.seen.lattice) for s in samples]) - clean
    assert noise.std(axis=0) == pytest.approx([0.1] * 6, rel=0.15)
    assert all(np.array_equal(s.seen.frac_coords, crystal.frac_coords) for s in samples)


def test_noise_on_fractions_is_uniform_and_one_sided():
    crystal = crystal_of(400)
    seen = NoiseFractions(0.3).on_crystal(Sample.clean(crystal), draw()).seen
    noise = (seen.frac_coords - crystal.frac_coords) % 1
    assert noise.min() >= 0 and noise.max() < 0.3 + 1e-6
    assert np.quantile(noise, [0.25, 0.75]) == pytest.approx([0.075, 0.225], abs=0.02)
    assert np.array_equal(seen.lattice, crystal.lattice)


def test_noise_on_entries_adds_to_each_of_the_nine():
    """Up to a rotation, by which the cell comes back to standard orientation."""
    crystal = crystal_of(30)
    for i in range(20):
        rng, same = draw(i), draw(i)
        seen = NoiseLatticeEntries(0.3).on_crystal(Sample.clean(crystal), rng).seen
        noisy = crystal.lattice + same.uniform(0, 0.3, (3, 3))
        np.testing.assert_allclose(seen.lattice @ seen.lattice.T, noisy @ noisy.T)
        assert not np.triu(seen.lattice, 1).any() and np.linalg.det(seen.lattice) > 0
        assert np.array_equal(seen.frac_coords, crystal.frac_coords)
    flat = replace(crystal, lattice=np.diag([5.0, 5.0, 1e-9]))
    for i in range(50):
        lattice = NoiseLatticeEntries(0.3).on_crystal(Sample.clean(flat), draw(i)).seen.lattice
        assert np.isfinite(lattice).all() and np.linalg.det(lattice) > 0


def test_cells_that_are_none_are_drawn_again():
    small = Crystal.create("small", [1], [[0, 0, 0]], 2 * np.eye(3))
    for i in range(50):
        lattice = NoiseLattice(1.5).on_crystal(Sample.clean(small), draw(i)).seen.lattice
        assert 4 < np.linalg.det(lattice) < 16
    tiny = Crystal.create("tiny", [1], [[0, 0, 0]], 0.11 * np.eye(3))
    with pytest.raises(ValueError, match=r"lattice noise 5\.0 gave no sound cell"):
        NoiseLattice(5.0).on_crystal(Sample.clean(tiny), draw())


@given(st.integers(0, 10**6), st.integers(1, 50))
def test_lattices_come_back_from_their_numbers(seed, atoms):
    lattice = crystal_of(atoms, seed).lattice
    np.testing.assert_allclose(standard_lattice(lattice_constants(lattice)), lattice, atol=1e-8)
    state = log_metric(lattice, atoms)
    np.testing.assert_allclose(from_log_metric(state, atoms), lattice, atol=1e-8)
    turned = np.linalg.qr(draw(seed).standard_normal((3, 3)))[0]
    np.testing.assert_allclose(log_metric(lattice @ turned, atoms), state, atol=1e-8)


def test_log_metric_of_cubes_and_of_a_strain():
    """Zero for a cube of natural volume; then the first coordinate alone grows with the volume, the
    others alone with a strain that keeps it."""
    cube = 20 ** (1 / 3) * np.eye(3)
    np.testing.assert_allclose(log_metric(2 * cube, 8), np.zeros(6), atol=1e-12)
    small, large = (log_metric(np.exp(x) * cube, 1) for x in (0.1, 0.2))
    np.testing.assert_allclose(large, 2 * small, atol=1e-12)
    assert small[0] > 0.5 and not small[1:].any()
    strained = log_metric(cube @ np.array([[1, 0, 0], [0.3, 1, 0], [0, 0.1, 1.0]]), 1)
    assert abs(strained[0]) < 1e-12 and (np.abs(strained[1:]) > 1e-3).all()


@given(st.lists(st.floats(-6, 6), min_size=6, max_size=6))
def test_every_log_metric_is_a_sound_cell(state):
    lattice = from_log_metric(np.array(state), 5)
    assert np.isfinite(lattice).all() and np.linalg.det(lattice) > 0


def test_angles_that_close_no_corner_are_no_cell():
    assert standard_lattice(np.array([3, 3, 3, 60, 60, 170.0])) is None
    assert standard_lattice(np.array([3, -3, 3, 90, 90, 90.0])) is None
    assert standard_lattice(np.array([3, 3, 3, 90, 90, 180.0])) is None


def test_diffusion_noises_to_its_level():
    crystal = crystal_of(40)
    alpha_bar, sigma = cosine_alpha_bar(100).numpy(), wrapped_sigma(100).numpy()
    levels = set()
    for i in range(40):
        sample = Diffuse(alpha_bar, sigma).on_crystal(Sample.clean(crystal), draw(i))
        (t,) = sample.extras["timestep"]
        state, noise = sample.extras["lattice_state"][0], sample.extras["lattice_noise"][0]
        levels.add(int(t))
        clean = np.sqrt(alpha_bar[t]) * log_metric(crystal.lattice, 40)
        np.testing.assert_allclose(state, clean + np.sqrt(1 - alpha_bar[t]) * noise, atol=1e-5)
        np.testing.assert_allclose(log_metric(sample.seen.lattice, 40), state, atol=1e-5)
        step = sample.seen.frac_coords - crystal.frac_coords
        step -= np.round(step)
        if sigma[t] < 0.1:
            assert step.std() == pytest.approx(sigma[t], rel=0.3)
    assert min(levels) >= 1 and max(levels) <= 100 and len(levels) > 20


def test_both_roundings_of_the_masked_share():
    for atoms, ratio, up, down in (
        (5, 0.3, 2, 1),
        (10, 0.1, 1, 1),
        (25, 0.1, 3, 2),
        (2, 0.1, 1, 1),
    ):
        sample = Sample.clean(crystal_of(atoms))
        assert MaskAtoms(ratio).on_crystal(sample, draw()).masked.sum() == up
        assert MaskAtoms(ratio, round_up=False).on_crystal(sample, draw()).masked.sum() == down


def undirected(graph):
    """Every edge without its direction, as many times as it is there, and its mirror images."""
    out, back = [], []
    for k, (target, source, shell, count) in enumerate(graph.edges.T.astype(int)):
        step = np.zeros(3) if graph.vectors is None else graph.vectors[k].round(2) + 0.0
        out += [(target, source, shell, *step)] * count
        back += [(source, target, shell, *(-step + 0.0))] * count
    return sorted(out), sorted(back)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("crystal", [SALT, crystal_of(5)], ids=["salt", "random"])
def test_edges_are_dropped_in_both_directions(spec, crystal):
    graph = neighbours(crystal, spec)
    before = graph.edges.copy()
    assert undirected(graph)[0] == undirected(graph)[1]
    for share in (0.1, 0.5):
        thin = drop_edges(graph, share, draw())
        assert graph.num_edges - thin.num_edges == 2 * int(share * graph.num_edges / 2)
        assert undirected(thin)[0] == undirected(thin)[1]
        kept = {tuple(e) for e in thin.edges[:3].T}
        assert kept <= {tuple(e) for e in graph.edges[:3].T}
        assert (np.diff(thin.edges[0].astype(int)) >= 0).all()
    assert np.array_equal(graph.edges, before)  # it may be kept for other epochs


def test_every_edge_is_as_likely_to_be_dropped():
    graph = neighbours(SALT, SPECS["quotient"])
    count = graph.edges[3].astype(float)
    left = np.zeros(len(count))
    for seed in range(400):
        thin = drop_edges(graph, 0.2, draw(seed))
        counts = {tuple(e[:3]): e[3] for e in thin.edges.T.astype(int)}
        left += [counts.get(tuple(e[:3]), 0) for e in graph.edges.T.astype(int)]
    expected = 1 - 2 * int(0.2 * graph.num_edges / 2) / graph.num_edges
    assert left / (400 * count) == pytest.approx(np.full(len(count), expected), abs=0.05)


def test_dropped_edges_are_those_of_the_key():
    def batch(key):
        sample = Sample.clean(crystal_of(6), key)
        return build([sample], SPECS["vectors"], transform=DropEdges(0.3))

    assert np.array_equal(batch(5).edge_index, batch(5).edge_index)
    assert not np.array_equal(batch(5).edge_index, batch(6).edge_index)


def test_labels_and_seen_structures_go_into_the_batch():
    crystals = [crystal_of(n, n) for n in (2, 3, 4)]
    transform = Chain((SpaceGroup(), CountPairEdges(), NoisePositions(0.1), NoiseLattice(0.1)))
    samples = [Sample.clean(c, i) for i, c in enumerate(crystals)]
    spec = SPECS["quotient"]
    whole = build(samples, spec, transform=transform)
    assert whole.extras["space_group"].tolist() == [1, 1, 1]
    assert len(whole.extras["pair_edges"]) == 4 + 9 + 16
    shown = [transform.on_crystal(s, draw(s.rng_key)).seen for s in samples]
    seen = np.concatenate([c.frac_coords for c in shown])
    np.testing.assert_allclose(whole.seen_frac_coords, seen, atol=1e-6)
    np.testing.assert_allclose(whole.seen_lattice[1], shown[1].lattice, atol=1e-5)
    halves = samples[:1], samples[1:]
    parts = concat([build(half, spec, transform=transform) for half in halves])
    for name, rows in whole.extras.items():
        assert np.array_equal(parts.extras[name], rows)
    assert np.array_equal(parts.seen_frac_coords, whole.seen_frac_coords)
    assert np.array_equal(parts.to("cpu").extras["pair_edges"], whole.extras["pair_edges"])


def test_views_are_two_draws_that_depend_on_the_sample_alone():
    views = TwoViews(Chain((ShiftAtoms(0.1), MaskAtoms(0.5))))
    sample = Sample.clean(crystal_of(8), rng_key=3)
    first, second = views.on_crystal(sample, draw())
    assert first.rng_key != second.rng_key and first.crystal is second.crystal
    assert not np.array_equal(first.seen.frac_coords, second.seen.frac_coords)
    again = views.on_crystal(sample, draw())[1]
    assert np.array_equal(again.seen.frac_coords, second.seen.frac_coords)
    assert np.array_equal(again.masked, second.masked) and again.rng_key == second.rng_key


def test_space_groups():
    fcc = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0] * 3, [0.5] * 3]
    )
    assert space_group(Crystal.from_pymatgen(fcc)) == 225
    assert space_group(SALT) == 221
    assert space_group(crystal_of(4)) == 1
    overlapping = Crystal.create("o", [1, 1], [[0, 0, 0], [0, 0, 1e-4]], 3 * np.eye(3))
    assert space_group(overlapping) == 1  # the search fails


def test_space_group_of_the_data_set_is_taken_and_found_ones_are_remembered(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "crysforge.datapipe.graphs.transforms.space_group", lambda c: calls.append(c.id) or 7
    )
    label = SpaceGroup()

    def number(crystal):
        return int(label.on_crystal(Sample.clean(crystal), draw()).extras["space_group"][0])

    assert number(SALT.with_targets({"space_group": 12.0})) == 12 and not calls
    assert number(SALT) == number(SALT.with_targets({"space_group": np.nan})) == 7
    assert calls == ["salt"]
    with pytest.raises(ValueError, match=r"'space_group' must be a number 1\.\.230, got 0"):
        number(SALT.with_targets({"space_group": 0.0}))


# Through the loader


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("transforms") / "data"
    with DatasetWriter(root, []) as writer:
        for i in range(12):
            crystal = replace(crystal_of(2 + i % 3, i), id=f"c{i}")
            writer.add("train", crystal)
        writer.finish({})
    return Dataset.open(root)


def batches(dataset, transform, count=3, seed=0, **settings):
    config = LoaderConfig(**{"workers": 0, **settings})
    source = Stream(
        dataset, "train", SPECS["quotient"], config, batch_size=4, transform=transform, seed=seed
    )
    return list(itertools.islice(source, count)), source


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_drawn_once_is_the_same_in_every_epoch(dataset, workers):
    def seen(transform, seed=0):
        """By epoch: mask and coordinates of every crystal, by id."""
        shown = [{}, {}, {}]
        for i, batch in enumerate(batches(dataset, transform, 9, seed, workers=workers)[0]):
            for id, start, end in zip(batch.ids, batch.ptr, batch.ptr[1:], strict=False):
                rows = batch.masked[start:end], batch.seen_frac_coords[start:end]
                shown[i // 3][id] = torch.cat([rows[0][:, None].double(), rows[1]], dim=1)
        return shown

    def alike(first, second):
        assert first.keys() == second.keys()
        return sum(torch.equal(first[id], second[id]) for id in first) / len(first)

    step = Chain((MaskAtoms(0.5), NoiseFractions(0.3)))
    first, second, third = seen(Once(step))
    assert alike(first, second) == alike(first, third) == 1
    first, second, _ = seen(step)
    assert alike(first, second) < 0.2
    assert alike(seen(Once(step), seed=1)[0], seen(Once(step))[0]) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_views_stay_together_in_a_batch(dataset, workers):
    transform = TwoViews(Chain((ShiftAtoms(0.05), SpaceGroup(), DropEdges(0.1))))
    found, _ = batches(dataset, transform, workers=workers)
    assert sorted(i for b in found for i in b.ids[::2]) == sorted(f"c{i}" for i in range(12))
    for batch, plain in zip(found, batches(dataset, transform)[0], strict=True):
        assert batch.ids[0::2] == batch.ids[1::2]
        assert batch.ids == plain.ids
        assert torch.equal(batch.seen_frac_coords, plain.seen_frac_coords)
        assert torch.equal(batch.edge_index, plain.edge_index)
        assert torch.equal(batch.extras["space_group"], plain.extras["space_group"])


def test_the_budget_counts_all_views(dataset):
    step = ShiftAtoms(0.05)
    for transform in (step, TwoViews(step)):
        for batch in batches(dataset, transform, 6, max_atoms=10)[0]:
            assert batch.num_atoms <= 10


def test_a_crystal_that_cannot_be_transformed_is_quarantined(dataset):
    found, source = batches(dataset, NoiseLattice(0.01), 3)
    assert sum(b.num_crystals for b in found) == 12

    class Refuse(Step):
        def on_crystal(self, sample, rng):
            if sample.crystal.id == "c3":
                raise ValueError("not this one")
            return sample

    found, source = batches(dataset, Refuse(), 3)
    assert sum(b.num_crystals for b in found) == 11
    assert "c3: not this one" in source.quarantined[0].reason
