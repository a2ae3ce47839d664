"""The synthetic crystals: the same everywhere, distinct, sensible, and labelled rightly."""

from __future__ import annotations

import math
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context

import numpy as np
import pytest

from crysforge.datapipe.crystals import prototypes as module
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.prototypes import (
    MAX_SIZE,
    TARGETS,
    UNITS,
    ewald_energy,
    prototype_crystal,
    prototypes,
)
from crysforge.trainer.jobs.baselines import baselines


@pytest.fixture(scope="module")
def crystals() -> list[Crystal]:
    return list(prototypes(size=400))


def same(a: Crystal, b: Crystal) -> bool:
    return (
        a.id == b.id
        and np.array_equal(a.numbers, b.numbers)
        and np.array_equal(a.frac_coords, b.frac_coords)
        and np.array_equal(a.lattice, b.lattice)
        and a.targets == b.targets
    )


def test_another_process_with_another_hash_seed_makes_the_same_crystals(crystals, monkeypatch):
    indices = [0, 1, 57, 133, 399]
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = list(pool.map(partial(prototype_crystal, seed=0), indices))
    assert all(same(crystals[i], c) for i, c in zip(indices, there, strict=True))


def test_a_smaller_set_is_the_beginning_of_a_larger_one(crystals):
    assert all(same(a, b) for a, b in zip(islice(prototypes(size=200), 20), crystals, strict=False))


def test_another_seed_makes_other_crystals(crystals):
    other = [prototype_crystal(i, seed=1) for i in range(20)]
    assert not any(
        np.array_equal(a.lattice, b.lattice) for a, b in zip(crystals, other, strict=False)
    )


def test_twenty_thousand_are_distinct():
    """No structure type, ions and stretch occur twice, and pairs repeat as late as possible."""
    count: dict = defaultdict(list)
    for index in range(MAX_SIZE):
        kind, ions = module._choice(index, 0)
        stretch = np.random.default_rng([0, index]).random()
        count[kind.name, kind.lattice.tobytes(), ions].append(stretch)
    assert all(len(set(stretches)) == len(stretches) for stretches in count.values())
    assert len(count) > MAX_SIZE / 2
    names = {name for name, _, _ in count}
    symbols = {ion.symbol for _, _, ions in count for ion in ions}
    assert len(names) > 150
    assert len(symbols) > 40


def test_pairs_name_every_suitable_pair_once():
    formula = (1, 1, 3)
    pairs = module._pairs(formula, seed=3)
    named = {(int(t), *map(int, row)) for t, row in zip(pairs.type_index, pairs.ions, strict=True)}
    assert len(named) == len(pairs.ions)
    ions = module.usable_ions()
    for t, *row in islice(named, 300):
        chosen = [ions[i] for i in row]
        assert sum(n * ion.charge for n, ion in zip(formula, chosen, strict=True)) == 0
        anions = [ion.electronegativity for ion in chosen if ion.charge < 0]
        cations = [ion.electronegativity for ion in chosen if ion.charge > 0]
        assert min(anions) > max(cations)
        radius, charge = np.array([i.radius for i in chosen]), module.charges(chosen)
        assert pairs.types[t].packing(radius, charge) > module._PACKING


def test_crystals_are_well_formed(crystals):
    assert len({c.id for c in crystals}) == len(crystals)
    for c in crystals:
        again = Crystal.create(c.id, c.numbers, c.frac_coords, c.lattice, c.targets)
        assert np.allclose(again.lattice, c.lattice, atol=1e-9)
        assert np.array_equal(again.frac_coords, c.frac_coords)
        assert 2 <= len(c) <= 40
        assert c.id.startswith("synthetic-")
        assert set(c.targets) == set(TARGETS) == set(UNITS)
        assert all(math.isfinite(v) for v in c.targets.values())


def test_no_atoms_are_close_and_no_density_absurd(crystals):
    for c in crystals:
        distances = c.to_pymatgen().distance_matrix + 10 * np.eye(len(c))
        edges = np.linalg.norm(c.lattice, axis=1)
        assert min(distances.min(), edges.min()) > 1.2, c.id
        assert 0.5 < c.targets["density"] < 20, c.id


def test_about_half_the_crystals_keep_their_symmetry(crystals):
    groups = [c.to_pymatgen().get_space_group_info(symprec=1e-3)[1] for c in crystals[:100]]
    assert 30 < sum(group == 1 for group in groups) < 70
    assert len(set(groups)) > 15


def test_density_and_volume_agree_with_pymatgen(crystals):
    for c in crystals[:50]:
        structure = c.to_pymatgen()
        assert c.targets["density"] == pytest.approx(float(structure.density), rel=1e-6)
        assert c.targets["volume_per_atom"] == pytest.approx(structure.volume / len(c), rel=1e-6)


@pytest.mark.parametrize(
    ("numbers", "frac", "lattice", "madelung"),
    [
        ([11, 17], [[0, 0, 0], [0.5] * 3], [[0, 1, 1], [1, 0, 1], [1, 1, 0]], 1.7475646),
        ([55, 17], [[0, 0, 0], [0.5] * 3], np.eye(3) * 2 / math.sqrt(3), 1.7626748),
        (
            [30, 16],
            [[0, 0, 0], [0.25] * 3],
            np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) * 2 / math.sqrt(3),
            1.6380550,
        ),
    ],
)
def test_ewald_energy_has_the_madelung_constant(numbers, frac, lattice, madelung):
    """Nearest distance d and charges ±1: the energy is -M e² / (4 π ε0 d) per ion pair."""
    d = 2.8
    crystal = Crystal.create("x", numbers, frac, np.asarray(lattice) * d)
    assert ewald_energy(crystal, [1, -1]) == pytest.approx(
        -madelung * 14.39964548 / d / 2, abs=2e-5
    )


def test_ewald_energy_is_the_same_for_a_supercell(crystals):
    crystal = next(c for c in crystals if len(c) == 6)
    charges = np.array([2, 2, -1, -1, -1, -1])
    lattice = crystal.lattice * np.array([[2], [1], [1]])
    frac = np.concatenate([crystal.frac_coords, crystal.frac_coords + np.eye(3)[0]]) / [2, 1, 1]
    double = Crystal.create("x", np.tile(crystal.numbers, 2), frac, lattice)
    assert ewald_energy(double, np.tile(charges, 2)) == pytest.approx(
        ewald_energy(crystal, charges), abs=1e-5
    )


def test_composition_alone_does_not_give_the_energy(crystals):
    """Same composition, different energy; and ridge on composition stays far from the labels."""
    groups = defaultdict(list)
    for c in crystals:
        groups[c.id.split("-")[2]].append(c.targets["ewald_energy"])
    shared = [v for v in groups.values() if len(v) > 1]
    assert sum(map(len, shared)) > 0.8 * len(crystals)
    assert np.mean([np.std(v) for v in shared]) > 0.5
    parts = [
        ([c.numbers for c in part], np.array([c.targets["ewald_energy"] for c in part]))
        for part in (crystals[:300], crystals[300:350], crystals[350:])
    ]
    mae = baselines(*parts)
    assert 1.0 < mae["ridge"] < mae["mean"]


@pytest.mark.parametrize("size", [199, 20_001, 0, -5, 2000.0, True])
def test_size_out_of_range_is_one_clear_error(size):
    with pytest.raises(ValueError, match=r"200 to 20000 synthetic crystals: size="):
        prototypes(size=size)


def test_bad_seed_and_index_are_errors():
    with pytest.raises(ValueError, match="seed must be a whole number"):
        prototypes(seed=-1)
    with pytest.raises(ValueError, match=r"numbered 0\.\.19999"):
        prototype_crystal(20_000)
