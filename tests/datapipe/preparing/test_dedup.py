"""Deduplication: the plain matcher's answer, whatever is skipped or done at once."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from ase.io import write as write_ase
from hypothesis import given, settings
from hypothesis import strategies as st

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.duplicates import matcher as matcher_module
from crysforge.datapipe.preparing.duplicates import search as dedup
from crysforge.datapipe.preparing.duplicates.matcher import Group, Matcher, Reduced
from crysforge.datapipe.preparing.write import summary
from crysforge.datapipe.storage.dataset import Dataset
from tests.duplicates import (
    AB,
    PLAIN,
    distorted,
    ids,
    make_sets,
    other_view,
    polymorph,
    report,
    rows,
    run,
    store,
    variants,
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


def test_left_out_is_what_the_plain_matcher_finds(sets, tmp_path):
    found = run(sets["new"], tmp_path / "out", sets["known"])
    assert found == sets["against"]
    assert 5 <= len(found) < 20
    pairs = report(tmp_path / "out")["pairs"]
    assert pairs["formula"] > pairs["sites"] > pairs["compared"]
    assert pairs["compared"] >= pairs["matched"] == len(found)


def test_only_the_chosen_splits_count(sets, tmp_path):
    found = run(sets["new"], tmp_path / "out", sets["known"], splits=["test"])
    assert found == sets["against test"] != sets["against"]


def test_within_a_set_the_first_of_each_group_stays(sets, tmp_path):
    assert run(sets["new"], tmp_path / "out", within=True) == sets["within"]
    groups = PLAIN.group_structures([c.to_pymatgen() for c in sets["crystals"]])
    assert len(groups) == 24 - len(sets["within"])
    matches = rows(tmp_path / "out")
    assert not {row["same_as"] for row in matches} & sets["within"]
    assert report(tmp_path / "out")["within"]["duplicates"] == len(matches)


def test_workers_and_parts_change_nothing(sets, tmp_path, monkeypatch):
    run(sets["new"], tmp_path / "one", sets["known"], within=True)
    monkeypatch.setattr(dedup, "_LARGE", 3)
    monkeypatch.setattr(dedup, "_SCANNED", 4)
    run(sets["new"], tmp_path / "two", sets["known"], within=True, workers=2)
    for name in ("matches.csv", "dropped.csv", "index.safetensors", "dedup.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_view_is_a_duplicate_and_another_polymorph_is_not(tmp_path):
    rng = np.random.default_rng(0)
    first = {kind: polymorph(kind, 12, 8, kind) for kind in AB}
    known = store(tmp_path / "known", test=list(first.values()))
    views = [other_view(c, rng, f"other {kind}") for kind, c in first.items()]
    alien = polymorph("rocksalt", 12, 16, "alien")
    new = store(tmp_path / "new", train=[*views, alien])
    assert run(new, tmp_path / "out", known) == {view.id for view in views}
    assert {(row["id"], row["same_as"]) for row in rows(tmp_path / "out")} == {
        (f"other {kind}", kind) for kind in AB
    }
    assert all(float(row["rms"]) < 1e-3 for row in rows(tmp_path / "out"))


def test_rms_is_the_plain_matchers(tmp_path):
    rng = np.random.default_rng(1)
    crystal = polymorph("wurtzite", 30, 16, "a")
    moved = distorted(crystal, rng, 0.0, 0.1, "b")
    new, known = store(tmp_path / "n", train=[moved]), store(tmp_path / "k", train=[crystal])
    # The rest of the set is there so that something is left.
    new = store(tmp_path / "n2", train=[moved, polymorph("rocksalt", 3, 9, "c")])
    assert run(new, tmp_path / "out", known) == {"b"}
    (row,) = rows(tmp_path / "out")
    rms, largest = PLAIN.get_rms_dist(crystal.to_pymatgen(), moved.to_pymatgen())
    assert [float(row["rms"]), float(row["largest"])] == pytest.approx([rms, largest], abs=2e-4)
    assert 0.01 < float(row["rms"]) < float(row["largest"]) < 0.1


# -- The tests before the matcher ------------------------------------------------------------------


def test_no_match_is_skipped():
    """Of crystals near and beyond the tolerances in strain, displacement, or both."""
    rng, matcher = np.random.default_rng(2), Matcher()
    matched = skipped = 0
    for i in range(120):
        crystal = polymorph(list(AB)[i % len(AB)], 12, 8, "")
        other = distorted(
            other_view(crystal, rng, ""), rng, (0, 0.15)[i % 2], (0, 0.3)[i % 3 > 0], ""
        )
        known, new = Reduced(crystal, 0), Reduced(other, 1)
        fits = known.counts == new.counts and matcher.fits(known, new)
        may = matcher.may_fit(known, new)
        assert may or not fits, i
        matched, skipped = matched + fits, skipped + (not may)
    assert matched > 20
    assert skipped > 20


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.02, 0.12))
def test_no_match_is_skipped_in_any_cell(random_crystal, seed, n, shift):
    rng = np.random.default_rng(seed)
    crystal = random_crystal(rng, n)
    crystal = replace(crystal, numbers=rng.choice([8, 12], n).astype(np.uint8))
    stretch = np.diag(rng.uniform(0.5, 2, 3))
    crystal = Crystal.create("", crystal.numbers, crystal.frac_coords, crystal.lattice @ stretch)
    size = (crystal.volume / n) ** (1 / 3)
    other = distorted(other_view(crystal, rng, ""), rng, 0.05, shift * size, "")
    known, new = Reduced(crystal, 0), Reduced(other, 1)
    if known.counts == new.counts and Matcher().fits(known, new):
        assert Matcher().may_fit(known, new)


def test_pairs_in_blocks_are_the_same_pairs(monkeypatch):
    rng = np.random.default_rng(9)
    crystals = [Reduced(c, i) for i, c in enumerate(variants(rng, 12, "x"))]
    pairs = list(itertools.product(crystals, repeat=2))
    whole = [Matcher().may_fit(*pair) for pair in pairs]
    monkeypatch.setattr(matcher_module, "_AT_ONCE", 1)
    assert [Matcher().may_fit(*pair) for pair in pairs] == whole
    assert {False, True} == set(whole)


def test_the_most_similar_come_first_and_members_can_be_added():
    rng = np.random.default_rng(3)
    crystal = polymorph("wurtzite", 12, 8, "")
    group = Group()
    for i in range(20):
        group.add(Reduced(distorted(crystal, rng, 0.01 * i, 0.0, str(i)), i))
    found = [c.item for c in group.nearest(Reduced(crystal, 0))]
    assert len(group) == 20
    assert found[0] == 0
    assert sorted(found) == list(range(20))


# -- What counts -----------------------------------------------------------------------------------


def test_the_same_id_and_formula_is_a_duplicate_without_a_match(tmp_path):
    known = store(
        tmp_path / "known",
        test=[polymorph("rocksalt", 12, 8, "mp-1"), polymorph("rocksalt", 3, 9, "mp-2")],
    )
    new = store(
        tmp_path / "new",
        train=[polymorph("zincblende", 12, 8, "mp-1"), polymorph("rocksalt", 12, 16, "mp-2")],
    )
    assert run(new, tmp_path / "by id", known) == {"mp-1"}
    (row,) = rows(tmp_path / "by id")
    assert (row["by"], row["rms"]) == ("id", "")
    assert report(tmp_path / "by id")["references"][0]["by_id_without_match"] == 1
    assert run(new, tmp_path / "by id", known) == {"mp-1"}  # it is there
    with pytest.raises(ValueError, match="already holds a data set"):
        run(new, tmp_path / "by id", known, ids=False)
    assert run(new, tmp_path / "by structure", known, ids=False) == set()


@pytest.mark.parametrize(
    ("keep", "kept"), [("first", "c"), ("lowest:hull", "d"), ("highest:hull", "c")]
)
def test_which_of_several_is_kept(tmp_path, keep, kept):
    rng = np.random.default_rng(4)
    crystal = polymorph("rocksalt", 12, 8, "")

    def copy(id, hull):
        return other_view(crystal, rng, id).with_targets({"hull": hull})

    source = store(
        tmp_path / "in",
        train=[copy("a", -9.0)],
        val=[copy("b", -8.0)],
        test=[copy("c", -1.0), copy("d", -2.0), copy("e", float("nan"))],
    )
    assert run(source, tmp_path / "out", within=True, keep=keep) == set("abcde") - {kept}


def test_files_count_whole_and_their_unusable_crystals_are_counted(tmp_path):
    rng = np.random.default_rng(6)
    known = [polymorph("rocksalt", 12, 8, ""), polymorph("wurtzite", 30, 16, "")]
    broken = Crystal.create("", [12, 8], [[0, 0, 0], [0, 0, 0.001]], 4 * np.eye(3))
    write_ase(tmp_path / "test.extxyz", [c.to_ase() for c in [*known, broken]], format="extxyz")
    new = store(
        tmp_path / "new",
        train=[other_view(known[0], rng, "x"), polymorph("rocksalt", 3, 9, "y")],
        val=[other_view(known[1], rng, "z")],
    )
    assert run(new, tmp_path / "out", str(tmp_path / "test.extxyz")) == {"x", "z"}
    (reference,) = report(tmp_path / "out")["references"]
    assert (reference["crystals"], reference["unusable"]) == (2, 1)
    assert len(reference["sha256"]) == 64


def test_report_manifest_and_dropped_list_agree(sets, tmp_path):
    rng = np.random.default_rng(7)
    known = Dataset.open(sets["known"])
    (_, crystal), *_ = known.read([0])
    more = store(tmp_path / "known", test=[other_view(crystal, rng, "again")])
    found = run(sets["new"], tmp_path / "out", sets["known"], more)
    matches, told = rows(tmp_path / "out"), report(tmp_path / "out")
    assert {row["id"] for row in matches} == found
    assert [r["name"] for r in told["references"]] == ["known (1)", "known (2)"]
    for reference in told["references"]:
        mine = [row for row in matches if row["set"] == reference["name"]]
        assert reference["duplicates"] == len(mine) == len({row["id"] for row in mine})
        assert reference["of_its_crystals"] == len({row["same_as"] for row in mine})
    assert told["references"][0]["fingerprint"] == known.manifest.fingerprint
    assert told["dropped"] == {"train": len(found), "val": 0, "test": 0}
    assert told["kept"]["train"] == len(ids(tmp_path / "out")) == 24 - len(found)
    manifest = Dataset.open(tmp_path / "out").manifest
    assert manifest.provenance["dedup"] | {"undecided": []} == told
    assert sum(manifest.provenance["dropped"].values()) == len(found)
    assert {row["id"] for row in rows(tmp_path / "out", "dropped.csv")} == found
    assert f"{len(found)} duplicate of known (1)" in summary(manifest, "out")


def test_labels_units_and_splits_come_through(tmp_path):
    rng = np.random.default_rng(8)
    crystals = [
        polymorph(kind, 12, 8, kind).with_targets({"gap": i, "hull": float("nan")})
        for i, kind in enumerate(AB)
    ]
    new = store(tmp_path / "new", train=crystals[:2], val=crystals[2:3], test=crystals[3:])
    known = store(tmp_path / "known", test=[other_view(crystals[0], rng, "k")])
    run(new, tmp_path / "out", known)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.manifest.splits == {"train": 1, "val": 1, "test": 2}
    assert dataset.targets_of("gap").tolist() == [1, 2, 3, 4]
    assert np.isnan(dataset.targets_of("hull")).all()
    assert {t.unit for t in dataset.manifest.targets.values()} == {"eV"}
