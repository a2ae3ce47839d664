"""A material comes to the same cell from any cell, and comes out of it unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import spglib
from pymatgen.core import Lattice, Structure

from crysforge.datapipe.crystals.bases import TIE, standard_basis
from crysforge.datapipe.crystals.cells import (
    AS_GIVEN,
    Cells,
    cells_of,
    extensive_of,
    in_basis,
)
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.datapipe.crystals.translations import translations
from tests.cell_changes import CHANGES, MATERIALS
from tests.cell_changes import cells_of as all_cells

PRIMITIVE = Cells()
SKEWED = np.array([[1, 3, -2], [0, 1, 5], [0, 0, 1]])


def crystal(structure: Structure) -> Crystal:
    return Crystal.from_pymatgen(structure, "x")


def pattern(crystal: Crystal) -> np.ndarray:
    """Diffraction intensities in the crystal's basis: they know neither origin nor order."""
    index = np.indices((7, 7, 7)).reshape(3, -1).T - 3
    wave = np.exp(2j * np.pi * crystal.frac_coords @ index.T)
    return np.abs(crystal.numbers @ wave) ** 2 / crystal.numbers.sum() ** 2


def away(one: Crystal, other: Crystal) -> float:
    """Å that atoms of one crystal are away from the nearest like atoms of the other, at most; both
    in the same place of space."""
    points, steps = other.frac_coords @ other.lattice, one.frac_coords @ one.lattice
    away = steps[:, None] - points
    frac = away @ np.linalg.inv(other.lattice)
    length = np.linalg.norm((frac - np.rint(frac)) @ other.lattice, axis=-1)
    length[one.numbers[:, None] != other.numbers] = np.inf
    return float(length.min(axis=1).max())


@pytest.mark.parametrize("material", MATERIALS)
def test_ten_cells_become_one(material):
    structures = all_cells(material)
    found = {name: PRIMITIVE(crystal(s)) for name, s in structures.items()}
    first = found["primitive"]
    assert len(first) == len(structures["primitive"])
    for name, one in found.items():
        assert one.copies * len(one) == len(structures[name])
        np.testing.assert_allclose(one.lattice, first.lattice, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(pattern(one), pattern(first), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("material", MATERIALS)
def test_niggli_keeps_the_atoms_and_as_is_keeps_all(material):
    given = in_basis(crystal(MATERIALS[material]()), SKEWED)
    niggli = Cells(rule="niggli")(given)
    assert (len(niggli), niggli.copies) == (len(given), 1)
    assert niggli.volume == pytest.approx(given.volume)
    expected = crystal(MATERIALS[material]().get_reduced_structure("niggli")).lattice
    edges = [np.sort(np.linalg.norm(cell, axis=1)) for cell in (niggli.lattice, expected)]
    np.testing.assert_allclose(*edges, atol=1e-6)
    assert AS_GIVEN(given) is given


def test_a_cell_that_is_standard_is_left_alone():
    for one in prototypes(size=200, seed=2):
        there = PRIMITIVE(one)
        assert PRIMITIVE(there) is there


def test_cells_agree_with_spglib():
    rng = np.random.default_rng(3)
    for n, one in enumerate(prototypes(size=200, seed=5)):
        if n % 4:
            continue
        given = crystal(one.to_pymatgen().make_supercell(rng.integers(1, 3, 3), in_place=False))
        cell = given.lattice, given.frac_coords, given.numbers
        lattice, _, numbers = spglib.find_primitive(cell, symprec=1e-3)
        found = PRIMITIVE(given)
        assert len(found) == len(numbers)
        assert found.volume == pytest.approx(abs(np.linalg.det(lattice)), rel=1e-4)


def test_the_basis_is_niggli_s():
    rng = np.random.default_rng(0)
    for _ in range(100):
        lattice = Lattice.from_parameters(*rng.uniform(3, 9, 3), *rng.uniform(65, 115, 3)).matrix
        one = in_basis(Crystal.create("x", [6], [[0, 0, 0]], lattice), SKEWED)
        basis = standard_basis(one)
        assert round(np.linalg.det(basis)) == 1
        found, expected = basis @ one.lattice, spglib.niggli_reduce(one.lattice)
        np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-6)


def test_a_slanting_cell_is_straightened():
    basis = np.array([[1, 0, 0], [10_000, 1, 0], [-75_000, 17_500, 1]])
    one = Crystal.create("x", [6], [[0, 0, 0]], 4 * np.eye(3))
    slanting = Crystal("x", one.numbers, one.frac_coords, basis @ one.lattice)
    np.testing.assert_allclose(PRIMITIVE(slanting).lattice, one.lattice, atol=1e-6)


@pytest.mark.parametrize("material", ["rocksalt", "wurtzite", "ThCr2Si2 type", "pseudo-cubic"])
def test_the_last_digit_of_a_file_does_not_choose_the_basis(material):
    rng = np.random.default_rng(0)
    given = PRIMITIVE(crystal(MATERIALS[material]()))
    lattices = []
    for _ in range(20):
        noise = TIE / 20 * rng.uniform(-1, 1, (3, 3))
        moved = Crystal.create("x", given.numbers, given.frac_coords, given.lattice + noise)
        lattices.append(PRIMITIVE(in_basis(moved, SKEWED)).lattice)
    assert np.ptp(lattices, axis=0).max() < TIE


@pytest.mark.parametrize("tolerance", [0.01, 0.1])
def test_no_atom_moves_further_than_the_tolerance(tolerance):
    rng = np.random.default_rng(1)
    cells, reduced = Cells(tolerance=tolerance), 0
    for scale in np.linspace(0.1, 3, 30):
        given = crystal(MATERIALS["quartz"]().make_supercell((2, 1, 2), in_place=False))
        shift = rng.normal(size=(len(given), 3))
        shift *= scale * tolerance / np.linalg.norm(shift, axis=1, keepdims=True)
        frac = given.frac_coords + shift @ np.linalg.inv(given.lattice)
        found = translations(Crystal.create("x", given.numbers, frac, given.lattice), tolerance)
        one = cells(Crystal.create("x", given.numbers, frac, given.lattice))
        assert one.copies == len(found)
        places = (given.numbers[found.atoms], found.places @ given.lattice)
        copies = np.concatenate([places[1] + s / found.order @ given.lattice for s in found.steps])
        numbers = np.tile(places[0], len(found))
        whole = Crystal("x", numbers, copies @ np.linalg.inv(given.lattice), given.lattice)
        moved = Crystal("x", given.numbers, frac, given.lattice)
        assert away(moved, whole) <= tolerance + 1e-9
        assert one.copies == 4 or scale > 0.5  # the mean may be as far on the other side
        reduced += one.copies > 1
    assert 0 < reduced < 30


def test_a_distortion_beyond_the_tolerance_is_part_of_the_crystal():
    pair = MATERIALS["rocksalt"]().make_supercell((2, 1, 1), in_place=False)
    pair.translate_sites([0], [0, 0, 0.05], frac_coords=False)
    assert PRIMITIVE(crystal(pair)).copies == 1
    assert Cells(tolerance=0.1)(crystal(pair)).copies == 8
    pair[1] = "K"
    assert Cells(tolerance=0.1)(crystal(pair)).copies == 1


def test_translations_form_a_group_of_the_cell():
    given = crystal(MATERIALS["bcc iron"]().make_supercell([[2, 1, 0], [0, 3, 1], [1, 0, 2]]))
    found = translations(given, 0.01)
    steps = {tuple(step) for step in found.steps.tolist()}
    assert len(found) == len(steps) == len(given) and len(found.atoms) == 1
    for one in found.steps:
        assert tuple(((one + found.steps[1]) % found.order).tolist()) in steps
    assert np.linalg.det(found.basis()) == pytest.approx(1 / len(found))


def test_two_atoms_in_one_place_are_no_translation():
    twice = Crystal.create(
        "x", [11, 11, 17, 17], np.repeat([[0, 0, 0], [0.5] * 3], 2, 0), 4 * np.eye(3)
    )
    assert PRIMITIVE(twice).copies == 1


def test_large_and_disordered_cells_are_quick():
    rng = np.random.default_rng(0)
    glass = Crystal.create("x", np.full(400, 14), rng.random((400, 3)), 20 * np.eye(3))
    assert PRIMITIVE(glass).copies == 1
    big = crystal(MATERIALS["rocksalt"]().make_supercell((6, 5, 4), in_place=False))
    assert (len(big), PRIMITIVE(big).copies) == (960, 480)


def test_labels_and_id_stay():
    given = crystal(MATERIALS["rocksalt"]()).with_targets({"gap": 5.0})
    one = PRIMITIVE(given)
    assert (one.id, dict(one.targets), one.copies) == ("x", {"gap": 5.0}, 4)


def test_settings_and_records_are_checked():
    with pytest.raises(ValueError, match="cell must be one of primitive, niggli, as_is"):
        Cells(rule="primitve")
    for tolerance in (0.0, -1.0, 0.3, float("nan")):
        with pytest.raises(ValueError, match="cell_tolerance is a distance"):
            Cells(tolerance=tolerance)
    for cells in (Cells(tolerance=0.02), Cells(rule="niggli"), AS_GIVEN):
        assert Cells.recorded(cells.describe()) == cells
    assert Cells.recorded(None) == AS_GIVEN
    for damaged in (
        5,
        {"rule": "mine"},
        {"rule": ["primitive"]},
        {"rule": "primitive", "tolerance": "x"},
    ):
        with pytest.raises(ValueError):
            Cells.recorded(damaged)


def test_histories_say_which_cell_it_is():
    primitive = {"cell": {**Cells().describe(), "reduced": 3}, "extensive": ["total_energy"]}
    wide = {"cell": Cells(tolerance=0.1).describe(), "extensive": ["volume"]}

    def merged(*histories):
        return {"action": "merge", "sources": [{"provenance": h} for h in histories]}

    assert cells_of({}) == AS_GIVEN and extensive_of({}) == []
    assert cells_of(primitive) == Cells()
    assert cells_of(merged(primitive, merged(wide))) == Cells(tolerance=0.1)
    assert extensive_of(merged(primitive, merged(wide))) == ["total_energy", "volume"]
    assert cells_of(merged(primitive, {})) == AS_GIVEN
    assert cells_of({"action": "merge", "sources": [5, {"provenance": 6}, "x"]}) == AS_GIVEN
    assert extensive_of({"extensive": "volume"}) == []


def test_the_changes_are_what_they_say():
    assert len(CHANGES) == 10 and len(MATERIALS) > 10
    numbers = {spglib.get_spacegroup(crystal_cell(m)).split()[0] for m in MATERIALS}
    assert len(numbers) == len(MATERIALS) - 1  # the two without symmetry


def crystal_cell(material):
    one = crystal(MATERIALS[material]())
    return one.lattice, one.frac_coords, one.numbers
