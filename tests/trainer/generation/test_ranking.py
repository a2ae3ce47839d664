"""What is asked for, and which samples come first."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.trainer.generation.config import parse_units
from crysforge.trainer.generation.known import Known, composition_of
from crysforge.trainer.generation.ranking import ranked
from crysforge.trainer.generation.request import chunks, composition, of_formula, of_table, outside
from crysforge.trainer.judging.novelty import SAME


@pytest.mark.parametrize(
    "text, units", [("4", [4]), ("1-3", [1, 2, 3]), ("1,2,4", [1, 2, 4]), ("2, 1-2", [1, 2])]
)
def test_formula_units(text, units):
    assert parse_units(text) == units


@pytest.mark.parametrize("text", ["", "0", "a", "1-", "-2", "3-1", "1-99999999999"])
def test_what_is_no_number_of_units(text):
    with pytest.raises(ValueError, match="number of formula units"):
        parse_units(text)


def test_formulas():
    assert composition("LiFePO4") == {3: 1, 26: 1, 15: 1, 8: 4}
    assert composition("Ca(OH)2") == {20: 1, 8: 2, 1: 2}
    for text in ("", "Xx2", "Na0.5Cl", "nonsense"):
        with pytest.raises(ValueError, match="is no formula"):
            composition(text)


def test_a_sample_is_keyed_by_what_it_is():
    first = of_formula("NaCl", [1, 2], 3, seed=0)
    again = of_formula("ClNa", [2], 5, seed=0)
    keys = {(a.units, a.sample): a.wanted.key for a in first}
    for a in again:  # the order of a formula, other samples and other Z change nothing
        assert keys.get((2, a.sample), a.wanted.key) == a.wanted.key
    assert len(set(keys.values())) == 6
    other = {a.wanted.key for a in of_formula("NaCl", [1, 2], 3, seed=1)}
    assert not other & set(keys.values())


def test_chunks_hold_all_once_and_are_bounded():
    asked = of_formula("NaCl", [1, 3, 20], 7, 0) + of_formula("Li", [1], 5, 0)
    parts = chunks(asked, 50)
    assert sorted(a.wanted.name for p in parts for a in p) == sorted(a.wanted.name for a in asked)
    for part in parts:
        atoms = [len(a.wanted) for a in part]
        assert len(part) == 1 or (sum(atoms) <= 50 and sum(n * n for n in atoms) <= 500)


def test_what_a_model_does_not_know_is_named():
    asked = of_formula("NaCl", [1, 6], 1, 0)
    found = list(outside(asked, frozenset({11}), (2.0, 10.0)))
    assert found == ["element Cl", "12 atoms in a cell (2 to 10)"]
    assert not list(outside(asked, frozenset(), None))


def test_a_table_names_the_line_that_is_wrong(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("formula,z\nNaCl,2\nNa1-x,\n")
    with pytest.raises(ValueError, match=r"line 3: 'Na1-x' is no formula"):
        of_table(path, [1], 2, 0)
    path.write_text("name\nNaCl\n")
    with pytest.raises(ValueError, match="a column 'formula'"):
        of_table(path, [1], 2, 0)


@pytest.fixture(scope="module")
def crystals():
    return [c for c in prototypes(size=200, seed=2) if 2 <= len(c) <= 8][:3]


def moved(crystal, rng):
    frac = crystal.frac_coords + 0.003 * rng.normal(size=crystal.frac_coords.shape) + rng.random(3)
    return Crystal.create("m", crystal.numbers, frac, crystal.lattice)


def samples(crystals):
    """Of one formula as asked: three of one structure, two of another, one that nothing is like."""
    rng, out = np.random.default_rng(0), []
    order = (0, 1, 0, 2, 1, 0)
    for number, which in enumerate(order):
        asked = of_formula("NaCl", [1], 6, 0)[number]
        out.append((asked, moved(crystals[which], rng)))
    return out


def test_what_most_samples_agree_on_comes_first(crystals):
    found = ranked(samples(crystals))
    assert [r.asked.sample for r in found] == [0, 2, 5, 1, 4, 3]
    assert [r.rank for r in found] == [1, 2, 3, 4, 5, 6]
    assert [round(r.score, 3) for r in found] == [0.5, 0.5, 0.5, 0.333, 0.333, 0.167]
    first, second = found[0].asked.wanted.name, found[3].asked.wanted.name
    assert [r.same_as for r in found] == ["", first, first, "", second, ""]


def test_a_judge_ranks_by_energy(crystals):
    energies = [3.0, 1.0, 2.0, math.nan, 0.5, 9.0]
    found = ranked(samples(crystals), lambda given: energies[: len(given)])
    assert [r.asked.sample for r in found] == [4, 1, 2, 0, 5, 3]
    best = found[0].asked.wanted.name
    assert found[1].same_as == best and found[0].same_as == ""


def test_known_crystals_are_found(crystals):
    rng = np.random.default_rng(1)
    known = Known(
        {k: [c for c in crystals if composition_of(c) == k] for k in map(composition_of, crystals)}
    )
    assert known.same(moved(crystals[0], rng), SAME) == crystals[0].id
    other = Crystal.create("o", [3] * len(crystals[0]), crystals[0].frac_coords, 4 * np.eye(3))
    assert known.same(other, SAME) == ""
