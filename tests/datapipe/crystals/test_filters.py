"""Filters: each drops what it says and nothing else; the closest pair is the true one."""

import itertools

import numpy as np
import pytest
from ase.data import atomic_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.filters import (
    Filters,
    closest_pair,
    density,
    describe,
    is_charge_neutral,
)

ROCKSALT = Crystal.from_pymatgen(
    Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    ),
    "NaCl",
    {"gap": 5.0},
)


def closest_by_definition(crystal: Crystal, reach: int) -> float:
    """Shortest distance between atoms over (2 reach + 1)³ cells."""
    best = np.inf
    for shift in itertools.product(range(-reach, reach + 1), repeat=3):
        step = crystal.frac_coords[None] - crystal.frac_coords[:, None] + np.array(shift)
        distance = np.linalg.norm(step @ crystal.lattice, axis=-1)
        if shift == (0, 0, 0):
            np.fill_diagonal(distance, np.inf)
        best = min(best, float(distance.min()))
    return best


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), flatness=st.floats(0.05, 1.0))
def test_closest_pair_is_the_closest(seed, n, flatness):
    rng = np.random.default_rng(seed)
    cell = rng.uniform(-1, 1, (3, 3)) * rng.uniform(0.5, 6)
    cell[2] *= flatness
    if abs(np.linalg.det(cell)) < 0.05:
        return
    crystal = Crystal.create("x", rng.integers(1, 90, n), rng.random((n, 3)), cell)
    heights = 1 / np.linalg.norm(np.linalg.inv(crystal.lattice), axis=0)
    for cutoff in (0.5, 1.5, 3.0):
        reach = int(np.ceil(cutoff / heights).max()) + 1
        if reach > 12:
            continue
        true = closest_by_definition(crystal, reach)
        pair = closest_pair(crystal, cutoff)
        assert (pair is None) == (true >= cutoff)
        if pair is not None:
            assert pair[2] == pytest.approx(true, abs=1e-9) and pair[0] <= pair[1] < n


def test_closest_pair_in_blocks(monkeypatch):
    monkeypatch.setattr("crysforge.datapipe.crystals.filters._PAIRS_AT_ONCE", 10)
    rng = np.random.default_rng(0)
    crystal = Crystal.create("x", rng.integers(1, 90, 40), rng.random((40, 3)), np.eye(3) * 9)
    assert closest_pair(crystal, 3.0)[2] == pytest.approx(closest_by_definition(crystal, 1))


def test_atoms_too_close_are_bad():
    crystal = Crystal.create("x", [11, 17], [[0, 0, 0], [0, 0, 0.08]], np.eye(3) * 5)
    with pytest.raises(BadCrystal, match=r"atoms 0 \(Na\) and 1 \(Cl\) are 0\.40 Å apart") as error:
        Filters().check(crystal)
    assert error.value.reason == "atoms too close"
    assert Filters(min_distance=0.39).check(crystal) is None
    assert Filters(min_distance=0).check(crystal) is None
    image = Crystal.create("x", [11], [[0, 0, 0]], np.diag([5, 5, 0.4]))
    with pytest.raises(BadCrystal, match=r"atom 0 \(Na\) and its own image are 0\.40 Å"):
        Filters().check(image)


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        (Filters(allow=["Na"]), "element not wanted"),
        (Filters(allow=["Na", "Cl", "K"]), None),
        (Filters(deny=["Cl"]), "element not wanted"),
        (Filters(deny=["K"]), None),
        (Filters(elements=[2, 6]), None),
        (Filters(elements=[3, None]), "elements out of range"),
        (Filters(atoms=[8, 8]), None),
        (Filters(atoms=[None, 7]), "atoms out of range"),
        (Filters(volume=[179, 180]), None),
        (Filters(volume=[180, None]), "volume out of range"),
        (Filters(density=[2.1, 2.2]), None),
        (Filters(density=[None, 2]), "density out of range"),
        (Filters(labels={"gap": [5, 6]}), None),
        (Filters(labels={"gap": [None, 4.9]}), "gap out of range"),
        (Filters(labels={"unmeasured": [0, 1]}), None),
        (Filters(charge_neutral=True), None),
    ],
)
def test_filter(filters, reason):
    found = filters.check(ROCKSALT)
    assert (found and found[0]) == reason


def test_unknown_label_passes_a_range():
    unlabelled = ROCKSALT.with_targets({"gap": np.nan})
    assert Filters(labels={"gap": [0, 1]}).check(unlabelled) is None


def test_density_is_pymatgens():
    assert density(ROCKSALT) == pytest.approx(float(ROCKSALT.to_pymatgen().density), rel=1e-4)


@pytest.mark.parametrize(
    ("symbols", "neutral"),
    [("Na Cl", True), ("Fe Fe O O O", True), ("Cu Cu", True), ("Na Cl Cl", False)],
)
def test_charge_neutral(symbols, neutral):
    numbers = [atomic_numbers[s] for s in symbols.split()]
    n = len(numbers)
    crystal = Crystal.create("x", numbers, np.arange(3 * n).reshape(n, 3) / 30, np.eye(3) * 20)
    assert is_charge_neutral(crystal) == neutral
    reason = Filters(charge_neutral=True).check(crystal)
    assert (reason is None) == neutral


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_distance": -1}, "min_distance"),
        ({"allow": ["Na", "Qq"]}, r"filters\.allow: unknown element 'Qq'"),
        ({"atoms": [3]}, r"filters\.atoms must be \[least, most\]"),
        ({"volume": [9, 3]}, r"filters\.volume must be"),
        ({"labels": {"gap": [1]}}, r"filters\.labels\.gap must be"),
    ],
)
def test_bad_settings(values, words):
    with pytest.raises(ValueError, match=words):
        Filters(**values)


@pytest.mark.filterwarnings("ignore:No Pauling electronegativity")
@pytest.mark.parametrize("seed", range(30))
def test_charge_neutral_is_pymatgens_criterion(seed):
    rng = np.random.default_rng(seed)
    kinds = rng.choice([3, 8, 9, 13, 16, 17, 22, 26, 29, 50, 10], rng.integers(2, 4), False)
    numbers = np.repeat(kinds, rng.integers(1, 5, len(kinds)))
    frac = rng.random((len(numbers), 3))
    crystal = Crystal.create("x", numbers, frac, np.eye(3) * 20)
    composition = crystal.to_pymatgen().composition
    assert is_charge_neutral(crystal) == bool(composition.oxi_state_guesses(max_sites=-1))


def test_describe_names_what_is_on():
    assert describe(Filters(atoms=[2, None])) == {"min_distance": 0.5, "atoms": [2, None]}
