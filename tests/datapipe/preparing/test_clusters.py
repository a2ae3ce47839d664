"""Groups that crystals belong to: by formula, by elements, by structure in whatever cell."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.duplicates.matcher import Matcher, Reduced
from crysforge.datapipe.preparing.duplicates.records import Duplicates
from crysforge.datapipe.preparing.splitting.clusters import groups_of
from crysforge.datapipe.storage.dataset import Dataset
from tests.duplicates import other_view, polymorph, store, variants


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Crystals of three formulas, many of them the same structure in another cell."""
    made = variants(np.random.default_rng(3), 60, "x")
    return store(tmp_path_factory.mktemp("sets") / "several", train=made)


def same_structure(dataset: Dataset) -> set[tuple[int, int]]:
    """Pairs that the matcher takes for the same, every pair asked."""
    crystals = [c for _, c in dataset.read(range(len(dataset)))]
    reduced = [Reduced(c, i) for i, c in enumerate(crystals)]
    matcher, found = Matcher(), set()
    for a, b in itertools.combinations(sorted(reduced, key=lambda r: r.id), 2):
        if a.counts == b.counts and matcher.fits(a, b):
            found.add((a.item, b.item))
    return found


def test_clusters_are_the_components_of_equal_structures(several, tmp_path):
    dataset = Dataset.open(several)
    names, undecided = groups_of(dataset, "cluster", Duplicates(), tmp_path / "j", workers=1)
    assert undecided == 0
    component = list(range(len(dataset)))
    for a, b in same_structure(dataset):
        one, other = component[a], component[b]
        component = [one if c == other else c for c in component]
    assert len(set(component)) < 40
    for i, j in itertools.combinations(range(len(dataset)), 2):
        assert (names[i] == names[j]) == (component[i] == component[j])


def test_what_cannot_be_compared_keeps_its_formula_together(several, tmp_path):
    dataset = Dataset.open(several)
    settings = Duplicates(max_atoms=3)
    names, undecided = groups_of(dataset, "cluster", settings, tmp_path / "j", workers=2)
    formulas, _ = groups_of(dataset, "formula", Duplicates(), tmp_path / "k", workers=1)
    crystals = [c for _, c in dataset.read(range(len(dataset)))]
    assert undecided == sum(len(c) > 3 for c in crystals) > 10
    assert len(set(names)) == len(set(formulas)) == 3


def test_names_of_groups(tmp_path):
    root = store(
        tmp_path / "set",
        train=[
            polymorph("rocksalt", 11, 17, "b"),
            other_view(polymorph("rocksalt", 11, 17, ""), np.random.default_rng(0), "a"),
            polymorph("cesium chloride", 11, 17, "c"),
            Crystal.create("d", [11, 17, 17], [[0, 0, 0], [0.5] * 3, [0.2] * 3], np.eye(3) * 5),
        ],
    )
    dataset = Dataset.open(root)
    found = {by: groups_of(dataset, by, Duplicates(), tmp_path / str(by), 1)[0]
             for by in ("formula", "chemical_system", "cluster", None)}  # fmt: skip
    assert found["formula"] == ["Na1Cl1"] * 3 + ["Na1Cl2"]
    assert found["chemical_system"] == ["Cl-Na"] * 4
    assert found["cluster"] == ["Na1Cl1 a", "Na1Cl1 a", "Na1Cl1 c", "Na1Cl2 d"]
    assert found[None] == ["b", "a", "c", "d"]
