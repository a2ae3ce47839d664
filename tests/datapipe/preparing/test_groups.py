"""Splits and folds that a referee accepts: groups are never torn apart, sizes and classes are as
asked for, and nothing depends on the order of the input."""

from __future__ import annotations

import itertools
import os
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.duplicates.records import Duplicates
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.preparing.splitting import clusters
from crysforge.datapipe.preparing.splitting.balanced import balanced, classes_of, make_folds
from crysforge.datapipe.preparing.splitting.clusters import groups_of
from crysforge.datapipe.preparing.splitting.splits import by_fold, matbench_folds
from crysforge.datapipe.preparing.write import plan, summary
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import SPLITS
from tests.duplicates import other_view, polymorph
from tests.groups import config, make_input, members

# -- The rule --------------------------------------------------------------------------------------


def grouped(seed: int, n: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"group {g}" for g in rng.zipf(1.6, n) % count]


CASES = {
    "seed": st.integers(0, 10_000),
    "n": st.integers(12, 200),
    "count": st.integers(8, 150),
    "shares": st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.0, 0.5), (0.2,) * 5, (1.0, 0.0, 0.0)]),
}


@given(**CASES)
def test_groups_are_whole_and_sizes_near_their_shares(seed, n, count, shares):
    names = grouped(seed, n, count)
    parts = sum(share > 0 for share in shares)
    if len(set(names)) < parts:
        with pytest.raises(ValueError, match="groups are too few for"):
            balanced(names, shares, seed)
        return
    part = balanced(names, shares, seed)
    by_group = {name: {p for p, own in zip(part, names, strict=True) if own == name}
                for name in set(names)}  # fmt: skip
    assert all(len(found) == 1 for found in by_group.values())
    assert set(part) == {p for p, share in enumerate(shares) if share > 0}
    largest = max(names.count(name) for name in set(names))
    for p, share in enumerate(shares):
        assert share * n - largest - 1 <= (part == p).sum() <= share * n + parts * largest


@given(**CASES)
def test_the_order_of_the_input_and_other_seeds(seed, n, count, shares):
    names = grouped(seed, n, count)
    if len(set(names)) < sum(share > 0 for share in shares):
        return
    part = balanced(names, shares, seed)
    order = np.random.default_rng(seed).permutation(n)
    again = balanced([names[i] for i in order], shares, seed)
    assert (again == part[order]).all() and (balanced(names, shares, seed) == part).all()


def test_another_seed_is_another_split():
    names = [str(i) for i in range(300)]
    one, other = (balanced(names, [0.8, 0.1, 0.1], seed) for seed in (0, 1))
    assert 20 < (one != other).sum() < 150


@given(seed=st.integers(0, 10_000), n=st.integers(20, 300), share=st.floats(0.05, 0.5))
def test_classes_are_alike_in_all_parts(seed, n, share):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(n) < 0.1, np.nan, (rng.random(n) < share).astype(float))
    classes = classes_of(labels)
    if classes is None:
        assert len(np.unique(labels[~np.isnan(labels)])) < 2 or n < 20
        return
    shares = [0.6, 0.2, 0.2]
    part = balanced([str(i) for i in range(n)], shares, seed, classes)
    for kind in np.unique(classes):
        held = np.bincount(part[classes == kind], minlength=3)
        assert (np.abs(held - np.array(shares) * held.sum()) < 2).all()


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([0, 1] * 10, True),
        ([0, 1] * 10 + [np.nan], True),
        ([0.5, 1.5, 2.5] * 10, True),
        ([0, 1, 2], False),  # three quantities
        (list(range(100)), False),
        ([1] * 100, False),
        ([np.nan] * 100, False),
    ],
)
def test_labels_that_are_classes(labels, found):
    classes = classes_of(np.array(labels, dtype=float))
    assert (classes is not None) == found
    if classes is not None:
        assert (np.isnan(labels) == (classes == classes.max())).all() or not np.isnan(labels).any()


@given(seed=st.integers(0, 10_000), n=st.integers(40, 200), folds=st.integers(2, 8))
def test_every_crystal_is_tested_once_and_validates_elsewhere(seed, n, folds):
    names = grouped(seed, n, 150)
    if len(set(names)) <= folds + 1:
        return
    try:
        found = make_folds(names, folds, seed)
    except ValueError as error:
        assert "one group is so large" in str(error) and folds == 2
        return
    assert set(found.test) == set(range(folds))
    for fold in range(folds):
        test = found.test == fold
        val = (found.validates >> np.uint32(fold)) & 1 == 1
        train = ~test & ~val
        assert not (test & val).any() and train.any() and val.any()
        groups = [{n for n, own in zip(names, mask, strict=True) if own}
                  for mask in (train, val, test)]  # fmt: skip
        for one, other in itertools.combinations(groups, 2):
            assert not one & other
    order = np.random.default_rng(seed).permutation(n)
    again = make_folds([names[i] for i in order], folds, seed)
    assert (again.test == found.test[order]).all()
    assert (again.validates == found.validates[order]).all()


def test_too_few_groups_for_folds():
    with pytest.raises(ValueError, match="3 groups are too few for 3 folds: give fewer"):
        make_folds(list("abc"), 3, 0)
    with pytest.raises(ValueError, match="folds must be 2 to 32, got 33"):
        make_folds([str(i) for i in range(99)], 33, 0)
    with pytest.raises(ValueError, match="folds must be 2 to 32, got 1"):
        PrepareConfig(folds=1)
    with pytest.raises(ValueError, match="unknown split_by 'formulas': did you mean 'formula'"):
        PrepareConfig(split_by="formulas")


@given(n=st.integers(15, 300), seed=st.integers(0, 9))
def test_matbenchs_folds_together_are_those_one_by_one(n, seed):
    found = matbench_folds(n, seed)
    for fold in range(5):
        codes = by_fold(n, fold, seed)
        assert ((found.test == fold) == (codes == SPLITS.index("test"))).all()
        bits = (found.validates.astype(np.uint64) >> np.uint64(fold)) & np.uint64(1)
        assert ((bits == 1) == (codes == SPLITS.index("val"))).all()


# -- prepare ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["formula", "chemical_system", "cluster"])
def test_prepare_tears_no_group_apart(by, tmp_path):
    source = make_input(tmp_path / "in")
    settings = {"split": "group", "split_by": by, "targets": ["gap"]}
    manifest = prepare(config(source, tmp_path / "out", **settings))
    names, _ = groups_of(Dataset.open(tmp_path / "out"), by, Duplicates(), tmp_path / "j", 1)
    split = [s for s in SPLITS for _ in range(manifest.splits[s])]
    assert all(len({s for n, s in zip(names, split, strict=True) if n == name}) == 1
               for name in set(names))  # fmt: skip
    largest = max(names.count(name) for name in names)
    for part, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert abs(manifest.splits[part] - share * 120) <= 3 * largest
        assert manifest.splits[part] > 0
    told = manifest.provenance["split"]
    assert told["split_by"] == by and told["groups"] == len(set(names))
    assert told["largest"] == largest and "stratified_by" not in told
    assert f"{len(set(names))} groups by {by}, each in one part" in summary(manifest, "out")
    # the same crystals in another order, and one more that is dropped
    other = make_input(tmp_path / "other", order=5, extra=True)
    prepare(config(other, tmp_path / "again", **settings))
    assert members(tmp_path / "again") == members(tmp_path / "out")
    assert "odd" in (tmp_path / "again" / "dropped.csv").read_text()
    prepare(config(source, tmp_path / "seeded", **settings, seed=7))
    assert members(tmp_path / "seeded") != members(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_classes_are_alike_and_quantities_are_left(tmp_path):
    source = make_input(tmp_path / "in")
    manifest = prepare(
        config(source, tmp_path / "out", split="ratio", ratio=[0.5, 0.25, 0.25], stratify="metal",
               targets=["gap"])
    )  # fmt: skip
    assert manifest.provenance["split"]["stratified_by"] == "metal"
    assert list(manifest.targets) == ["gap"]  # it is not kept
    found = members(tmp_path / "out")
    assert [len(found[s]) for s in SPLITS] == [60, 30, 30]
    for split in SPLITS:
        metals = sum(int(id[2:]) % 3 == 0 for id in found[split])
        assert metals == len(found[split]) // 3
    with pytest.raises(ValueError, match="stratify=gap: its 120 values are no classes"):
        prepare(config(source, tmp_path / "x", split="group", stratify="gap", targets=["gap"]))
    with pytest.raises(ValueError, match=r"split=count uses .*, not stratify"):
        prepare(config(source, tmp_path / "x", split="count", n_val=3, stratify="metal"))
    manifest = prepare(config(source, tmp_path / "auto", folds=3, targets=["metal"]))
    assert manifest.provenance["split"]["stratified_by"] == "metal"
    manifest = prepare(
        config(source, tmp_path / "none", folds=3, targets=["metal"], stratify="none")
    )
    assert "stratified_by" not in manifest.provenance["split"]
    assert not (tmp_path / "x").exists()


def test_shares_below_one_and_duplicates_beside_groups(tmp_path):
    source = make_input(tmp_path / "in")
    settings = {"split": "group", "ratio": [0.4, 0.2, 0.2], "shard_size": 11}
    settings["duplicates"] = Duplicates(within=True)
    manifest = prepare(config(source, tmp_path / "out", **settings))
    assert manifest.provenance["kept"] == sum(manifest.splits.values())
    left_out = manifest.provenance["dropped"]
    assert left_out["in no split"] > 0 and left_out["duplicate within the set"] > 0
    assert sum(left_out.values()) + sum(manifest.splits.values()) == 120
    rows = (tmp_path / "out" / "dropped.csv").read_text().splitlines()
    assert len(rows) == 1 + sum(left_out.values())
    assert (tmp_path / "out" / "dedup.json").is_file()
    assert max(s.count for s in manifest.shards) == 11


def test_a_killed_search_for_clusters_goes_on(tmp_path, monkeypatch):
    source = make_input(tmp_path / "in")
    asked = config(source, tmp_path / "out", split="group", split_by="cluster")
    pid = os.fork()
    if pid == 0:
        real, count = clusters.Link.__call__, itertools.count(1)

        def deadly(self, task):
            if next(count) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, task)

        clusters.Link.__call__ = deadly
        try:
            prepare(asked)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.groups").is_dir()
    calls = []
    real = clusters.Link.__call__
    monkeypatch.setattr(
        clusters.Link, "__call__", lambda self, task: calls.append(task) or real(self, task)
    )
    prepare(asked)
    assert 0 < len(calls) <= 24 - 4
    prepare(config(source, tmp_path / "whole", split="group", split_by="cluster"))
    assert members(tmp_path / "out") == members(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_a_plan_says_what_cannot_be_known_yet(tmp_path):
    source = make_input(tmp_path / "in")
    assert "made when the crystals are read" in plan(config(source, "x", split="group"))
    assert "split folds: 4 folds" in plan(config(source, "x", folds=4))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_crystals_need_no_split_settings(tmp_path, count):
    rng = np.random.default_rng(0)
    made = [other_view(polymorph("rocksalt", 11, 17, ""), rng, f"c-{i}") for i in range(count)]
    for crystal in made:
        crystal.to_pymatgen().to(str(tmp_path / f"{crystal.id}.cif"))
    source = tmp_path / "c-0.cif" if count == 1 else tmp_path
    manifest = prepare(config(source, tmp_path.parent / f"out-{count}"))
    assert list(manifest.splits.values()) == [1, int(count > 1), int(count > 2)]
