"""Distances are pymatgen's, validity is SMACT's, and tables say what happened."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.datapipe.preparing.duplicates.matcher import Reduced
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.generation.files import RankedRow, describe, write_failed, write_rows
from crysforge.trainer.generation.known import Known, composition_of
from crysforge.trainer.judging.baselines import COPY, RANDOM, SWAPPED, Baselines
from crysforge.trainer.judging.distances import CSP, DEFAULT, distance
from crysforge.trainer.judging.novelty import distinct
from crysforge.trainer.judging.prediction import Question, judge
from crysforge.trainer.judging.validity import composition_valid, structure_valid


def disturbed(crystal, size, rng, name=""):
    """Atoms moved, the cell strained, another basis, another origin."""
    n = len(crystal)
    basis = np.array([[1, 0, 0], [1, 1, 0], [0, -1, 1]])
    frac = crystal.frac_coords + size * rng.normal(size=(n, 3)) + rng.random(3)
    cell = crystal.lattice @ (np.eye(3) + 0.02 * rng.normal(size=(3, 3)))
    return Crystal.create(
        name or crystal.id, crystal.numbers, frac @ np.linalg.inv(basis), basis @ cell
    )


@pytest.fixture(scope="module")
def crystals():
    return [c for c in prototypes(size=200, seed=2) if len(c) <= 12][:12]


@pytest.mark.parametrize("tolerances", [CSP, DEFAULT], ids=["papers", "default"])
def test_distances_are_those_of_pymatgen(crystals, random_crystal, tolerances):
    rng = np.random.default_rng(0)
    found = [*crystals, *(random_crystal(rng, n, f"r{n}") for n in (1, 2, 4, 6))]
    matcher = StructureMatcher(
        stol=tolerances.stol, ltol=tolerances.ltol, angle_tol=tolerances.angle_tol
    )
    outcomes = []
    for number, known in enumerate(found):
        for size in (0.0, 0.02, 0.07, 0.5):
            made = disturbed(known, size, rng)
            expected = matcher.get_rms_dist(made.to_pymatgen(), known.to_pymatgen())
            value = distance(Reduced(made, 0), Reduced(known, 0), tolerances)
            outcomes.append(value is None)
            assert (value is None) == (expected is None), (number, size, value, expected)
            if expected is not None:
                assert value == pytest.approx(expected[0], abs=1e-6)
    assert any(outcomes) and not all(outcomes)


def of(numbers):
    return Crystal.create("c", numbers, [[0.1 * i] * 3 for i in range(len(numbers))], 9 * np.eye(3))


@pytest.mark.parametrize(
    "numbers, valid",
    [
        ([11, 17], True),  # NaCl
        ([38, 22, 8, 8, 8], True),  # SrTiO3
        ([26, 26, 28], True),  # an alloy
        ([6, 6], True),  # an element
        ([11, 11, 17], False),  # Na2Cl
        ([2, 8], False),  # helium has no states
        ([55, 79], True),  # CsAu, of metals
        ([5, 11], False),  # NaB: it balances, but the anion would be sodium
    ],
)
def test_compositions(numbers, valid):
    assert composition_valid(of(numbers)) == valid


def test_structures():
    cell = 4 * np.eye(3)
    assert structure_valid(Crystal.create("a", [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], cell))
    assert not structure_valid(Crystal.create("a", [11, 17], [[0, 0, 0], [0, 0, 0.95]], cell))
    assert structure_valid(Crystal.create("a", [11], [[0, 0, 0]], 0.48 * np.eye(3)))  # its image
    with pytest.raises(ValueError, match="did you mean 'smact14'"):
        composition_valid(of([11, 17]), "smact15")


def test_an_answer_counts_what_is_near(crystals):
    rng, target = np.random.default_rng(1), crystals[0]
    made = [disturbed(target, 0.5, rng), disturbed(target, 0.01, rng), disturbed(target, 0.0, rng)]
    made.append(Crystal.create("other", [3] * len(target), target.frac_coords, target.lattice))
    answer = judge(Question(target, made))
    assert answer.distances[2] < answer.distances[1] < 0.1
    assert answer.distances[3] == math.inf and not answer.strict_cells[3]
    assert answer.best(3) == answer.distances[2] and answer.best(2) == answer.distances[1]
    assert answer.best(4, gated=True) in (math.inf, answer.best(4))


def test_distinct_keeps_the_first_of_each(crystals):
    rng = np.random.default_rng(2)
    twice = [crystals[0], disturbed(crystals[0], 0.0, rng, "twin"), crystals[1]]
    assert [c.id for c in distinct(twice)] == [crystals[0].id, crystals[1].id]


def test_baselines_have_the_targets_composition(data):
    known = Known.of(Dataset.open(data), None, ["train"])
    baselines = Baselines(known)
    group = next(iter(known.crystals.values()))
    target = group[0]
    for name in (RANDOM, COPY, SWAPPED):
        made = baselines.make(name, target, 3, seed=0)
        assert len(made) <= 3 and (made or name != RANDOM)
        for crystal in made:
            assert composition_of(crystal) == composition_of(target)
        again = baselines.make(name, target, 3, seed=0)
        for a, b in zip(made, again, strict=True):
            assert np.array_equal(a.frac_coords, b.frac_coords)
    assert judge(Question(target, group[:1])).best(1) < 1e-3
    volume = baselines.volume(target.numbers)
    assert 0.2 < volume / target.volume < 5


@pytest.fixture
def predicted(data, tmp_path):
    """As `generate` would write them: the first sample of each target is it, the second is not."""
    dataset, rng = Dataset.open(data), np.random.default_rng(0)
    targets = [c for _, c in dataset.read(dataset.split_items("test").tolist())][:4]
    rows = []
    for target in targets:
        for sample, size in enumerate((0.0, 0.5)):
            name = f"{target.id}-{sample}"
            crystal = disturbed(target, size, rng, name)
            values = {
                "name": name, "formula": "X", "z": 1, "sample": sample, "rank": 1,
                "target": target.id, "number": len(rows) + 1, **describe(crystal),
            }  # fmt: skip
            rows.append(RankedRow(crystal, values))
    write_rows(tmp_path, rows)
    write_failed(tmp_path, [])
    return tmp_path


def test_predictions_are_judged_beside_baselines(predicted, data, call):
    job = [f"csp={predicted}", f"reference={data}", "workers=1"]
    code, out, err = call("evaluate", *job)
    assert code == 0, err
    assert "random coordinates" in out and "nearest formula" in out
    with open(predicted / "evaluation" / "prediction.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    mine = [r for r in rows if r[""] == predicted.name]
    assert [r["k"] for r in mine] == ["1", "2"]
    assert float(mine[0]["cRMSE"]) < 0.1 and float(mine[0]["within 0.1 %"]) == 100
    assert len({r[""] for r in rows}) == 4
    with open(predicted / "evaluation" / "metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
    code, _, err = call("evaluate", *job, "split=val")
    assert code == 2 and "lacks 4 targets" in err


def test_crystals_of_a_models_choice_are_judged(predicted, data, call):
    write_failed(
        predicted,
        [({"name": "x", "formula": "", "z": "", "target": ""}, BadCrystal("flat"))],
    )
    job = [f"generation={predicted}", f"reference={data}", "workers=1"]
    code, out, err = call("evaluate", *job)
    assert code == 0, err
    assert "new, unique and valid" in out and "1 came to nothing" in out
    with open(predicted / "evaluation" / "generation.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert row["asked"] == "9" and float(row["structure %"]) <= 100 * 8 / 9 + 0.01
    about = json.loads((predicted / "evaluation" / "metrics.json").read_text())
    assert about["oxidation"] == "smact14"


def test_what_cannot_be_judged_says_why(tmp_path, data, call):
    code, _, err = call("evaluate", f"csp={tmp_path}")
    assert code == 2 and "needs reference=DATA" in err
    code, _, err = call("evaluate", f"csp={tmp_path}", f"reference={data}")
    assert code == 2 and "holds no generated.extxyz" in err
    code, _, err = call("evaluate", f"csp={tmp_path}", f"suite={tmp_path}")
    assert code == 2 and "give one of suite" in err
