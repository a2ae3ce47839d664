"""Split rules: no record in two splits, the same every time, the published one literally."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crysforge.datapipe.preparing.splitting.splits import (
    NONE,
    by_count,
    by_fold,
    by_ids,
    by_ratio,
    choose_rule,
    published,
    read_ids,
)


def counts(codes: np.ndarray) -> list[int]:
    return [int((codes == c).sum()) for c in (0, 1, 2, NONE)]


@given(n=st.integers(10, 500), seed=st.integers(0, 5))
def test_ratio_covers_everything(n, seed):
    codes = by_ratio(n, [0.8, 0.1, 0.1], seed)
    train, val, test, none = counts(codes)
    assert train + val + test == n and none == 0
    assert val == test == max(1, round(0.1 * n))


def test_ratio_is_seeded_and_shuffled():
    first, again, other = (by_ratio(200, [0.5, 0.5], s) for s in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    assert 0 < counts(first[:100])[0] < 100


def test_shares_below_one_leave_records_out():
    assert counts(by_ratio(100, [0.2, 0.1, 0.1], 0)) == [20, 10, 10, 60]
    assert counts(by_ratio(100, [1.0, 0.0, 0.0], 0)) == [100, 0, 0, 0]
    assert counts(by_ratio(100, [0.0, 0.0, 1.0], 0)) == [0, 0, 100, 0]


@pytest.mark.parametrize("ratio", [[0.8, 0.3], [0.5], [-0.1, 1.1, 0], [0, 0, 0], [80, 10, 10]])
def test_bad_ratio(ratio):
    with pytest.raises(ValueError, match="ratio must be shares"):
        by_ratio(100, ratio, 0)


def test_too_few_for_a_ratio():
    with pytest.raises(ValueError, match="2 crystals are too few"):
        by_ratio(2, [0.8, 0.1, 0.1], 0)


def test_count():
    assert counts(by_count(20, 5, 4, 3, 0)) == [5, 4, 3, 8]
    assert counts(by_count(20, None, 4, 3, 0)) == [13, 4, 3, 0]
    for bad in [(15, 4, 3), (None, 15, 6), (5, -1, 0)]:
        with pytest.raises(ValueError, match="do not fit into 20 records"):
            by_count(20, *bad, 0)


@pytest.mark.parametrize("n", [10, 19, 57, 1001])
@pytest.mark.parametrize("sizes", [None, (5, 3, 2)])
def test_published_rule_is_the_recipe(n, sizes):
    present = np.random.default_rng(n).random(2 * n) < 0.5
    present[:20] = True
    dataset = [i for i, p in enumerate(present) if p]  # in file order

    total = len(dataset)
    if sizes:
        n_train, n_val, n_test = sizes
    else:
        n_train, n_val, n_test = int(0.8 * total), int(0.1 * total), int(0.1 * total)
    ids = list(np.arange(total))
    random.seed(123)
    random.shuffle(ids)
    id_train = ids[:n_train]
    id_val = ids[-(n_val + n_test) : -n_test]
    id_test = ids[-n_test:]

    codes = published(present, sizes)
    for code, chosen in enumerate((id_train, id_val, id_test)):
        assert np.flatnonzero(codes == code).tolist() == sorted(dataset[i] for i in chosen)


def test_published_rule_has_the_published_counts():
    assert counts(published(np.ones(18171, bool)))[:3] == [14536, 1817, 1817]
    assert counts(published(np.ones(69239, bool), (60000, 5000, 4239))) == [60000, 5000, 4239, 0]
    assert counts(published(np.ones(10, bool), (None, 2, 0))) == [8, 2, 0, 0]


def test_published_rule_needs_labels():
    with pytest.raises(ValueError, match="no record has the label"):
        published(np.zeros(5, bool))
    with pytest.raises(ValueError, match="do not fit into 5 records"):
        published(np.ones(5, bool), (4, 1, 1))


def test_id_lists(tmp_path):
    lists = {"train": ["a", "b"], "val": ["c"]}
    assert by_ids(["c", "x", "a", "b"], lists).tolist() == [1, NONE, 0, 0]
    with pytest.raises(ValueError, match="'a' is in both train and test"):
        by_ids(["a"], lists | {"test": ["a"]})
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        by_ids(["a"], {"dev": ["a"]})
    with pytest.raises(ValueError, match=r"none of the 3 listed ids .*'a'.* like 'mp-1'"):
        by_ids(["mp-1"], lists)


def test_id_files(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"train": [1, "b"], "test": ["c d"]}))
    assert read_ids(str(tmp_path / "s.json")) == {"train": ["1", "b"], "test": ["c d"]}
    folder = tmp_path / "lists"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"lists holds none of train\.txt"):
        read_ids(str(folder))
    (folder / "train.txt").write_text("a\nc d\n\n")
    assert read_ids(str(folder)) == {"train": ["a", "c d"]}
    for text, words in [
        ("[1]", "must hold"),
        ("{", "is not valid JSON"),
        ('{"train": "a"}', "must hold"),
    ]:
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(ValueError, match=f"s.json {words}"):
            read_ids(str(tmp_path / "s.json"))
    with pytest.raises(ValueError, match=r"split_ids '.*absent\.json' does not exist"):
        read_ids(str(tmp_path / "absent.json"))


@pytest.mark.parametrize(
    ("settings", "asked", "default", "rule"),
    [
        ({}, None, "ratio", "ratio"),
        ({}, None, "keep", "keep"),
        ({"ratio": [1, 0, 0]}, None, "keep", "ratio"),
        ({"n_val": 3}, None, "ratio", "count"),
        ({"split_ids": "x.json"}, None, "ratio", "ids"),
        ({"train": "a", "val": "b"}, None, "ratio", "file"),
        ({"n_val": 3}, "published-123", "ratio", "published-123"),
        ({"split_target": "gap"}, None, "ratio", "published-123"),
    ],
)
def test_rule_follows_from_what_is_given(settings, asked, default, rule):
    assert choose_rule(settings, asked, default) == rule


@pytest.mark.parametrize(
    ("settings", "asked", "words"),
    [
        ({"n_val": 3, "split_ids": "x"}, None, "uses ratio, stratify, not n_val, split_ids"),
        ({"ratio": [1, 0]}, "published-123", "not ratio"),
        ({}, "keep", "split=keep needs an input with splits: a prepared data set"),
        ({}, "ids", "split=ids needs split_ids"),
    ],
)
def test_settings_that_do_not_fit(settings, asked, words):
    with pytest.raises(ValueError, match=words):
        choose_rule(settings, asked, "ratio")


@given(n=st.integers(15, 300))
def test_matbench_folds_are_those_of_kfold(n):
    """KFold(5, shuffle=True, random_state=18012019), written out."""
    order = np.arange(n)
    np.random.RandomState(18012019).shuffle(order)
    sizes = [n // 5 + (fold < n % 5) for fold in range(5)]
    start = 0
    for fold, size in enumerate(sizes):
        codes = by_fold(n, fold, seed=0)
        assert set(np.flatnonzero(codes == 2)) == set(order[start : start + size])
        assert counts(codes)[1] == max(1, round(0.1 * (n - size))) and counts(codes)[3] == 0
        start += size


@pytest.mark.parametrize(("n", "fold", "words"), [(100, 5, "0 to 4"), (9, 0, "too few")])
def test_bad_folds(n, fold, words):
    with pytest.raises(ValueError, match=words):
        by_fold(n, fold, 0)
