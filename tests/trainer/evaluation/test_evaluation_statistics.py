"""Statistics: known values, symmetries, and rates of error in small simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from crysforge.trainer.evaluation.statistics import (
    holm,
    improvement,
    one_sample_p,
    paired_bootstrap,
    paired_test,
    summarise,
)

floats = st.floats(-100, 100).map(lambda x: round(x, 3))
pairs = st.lists(st.tuples(floats, floats), min_size=2, max_size=5)


def five_around(mean: float, std: float) -> np.ndarray:
    """Five numbers with exactly this mean and sample standard deviation."""
    x = np.array([-2.0, -1, 0, 1, 2])
    return mean + std * x / x.std(ddof=1)


def test_summary_is_what_the_crysldnet_paper_prints():
    # bulk modulus in its Table 9: 8.817 ± 0.240 over 5 seeds, interval ± 0.298, p 0.0024
    found = summarise(five_around(8.817, 0.24))
    assert found.mean == pytest.approx(8.817) and found.std == pytest.approx(0.24)
    assert found.high - found.mean == pytest.approx(0.298, abs=5e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert one_sample_p(five_around(8.817, 0.24), 9.546) == pytest.approx(0.0024, abs=1e-4)


def test_one_replicate_has_a_mean_and_nothing_else():
    found = summarise([3.0])
    assert (found.n, found.mean) == (1, 3.0)
    assert all(map(math.isnan, (found.std, found.low, found.high)))
    test = paired_test([3.0], [2.0])
    assert test.difference == 1 and math.isnan(test.p) and math.isnan(test.low)
    assert math.isnan(one_sample_p([3.0], 2.0))


@given(pairs)
def test_paired_test_is_scipys_and_turns_around(values):
    x, y = np.array(values).T
    there, back = paired_test(x, y), paired_test(y, x)
    assert there.difference == -back.difference
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.p == back.p
    if (x - y).std() > 1e-9:
        assert there.p == pytest.approx(stats.ttest_rel(x, y).pvalue)
    assert math.isnan(there.p_wilcoxon)  # five signs say too little


def test_folds_that_share_training_crystals_are_told_apart_too_often_without_correction():
    """Five folds of no real difference, correlated as their test and training sets make them."""
    rng, shared = np.random.default_rng(0), 1 / 5
    common, own = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 5))
    draws = shared**0.5 * common + (1 - shared) ** 0.5 * own
    plain = [paired_test(x, np.zeros(5)).p < 0.05 for x in draws]
    corrected = [paired_test(x, np.zeros(5), overlap=1 / 4) for x in draws]
    assert np.mean(plain) > 0.1
    assert np.mean([test.p < 0.05 for test in corrected]) == pytest.approx(0.05, abs=0.012)
    inside = [test.low <= 0 <= test.high for test in corrected]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)
    assert math.isnan(paired_test(np.arange(9.0), np.zeros(9), overlap=0.1).p_wilcoxon)


def test_wilcoxon_counts_signs_and_ranks():
    x = np.arange(1.0, 7)
    assert paired_test(x, np.zeros(6)).p_wilcoxon == pytest.approx(2 / 2**6)


def test_identical_arms_do_not_differ():
    x = np.array([0.1, 0.2, 0.3, 0.2, 0.1, 0.4])
    test, draws = paired_test(x, x), paired_bootstrap(x, x, "k", 200)
    assert (test.difference, test.p, test.p_wilcoxon) == (0, 1, 1)
    assert (draws.difference, draws.low, draws.high, draws.p) == (0, 0, 0, 1)


def test_a_constant_difference_is_certain():
    assert paired_test([1.5, 2.5, 3.5], [1.0, 2.0, 3.0]).p == 0
    assert paired_bootstrap(np.ones(50), np.zeros(50), "k", 999).p == pytest.approx(2 / 1000)


def test_bootstrap_turns_around_and_depends_on_its_key_alone():
    draw = np.random.default_rng(0)
    x, y = draw.exponential(1, 80), draw.exponential(1.2, 80)
    there, back = paired_bootstrap(x, y, "a", 500), paired_bootstrap(y, x, "a", 500)
    assert there == paired_bootstrap(x, y, "a", 500)
    assert there != paired_bootstrap(x, y, "b", 500)
    assert there.p == back.p and there.difference == pytest.approx((x - y).mean())
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_bootstrap_in_parts_is_the_bootstrap(monkeypatch):
    x, y = np.random.default_rng(1).normal(size=(2, 30))
    whole = paired_bootstrap(x, y, "a", 101)
    monkeypatch.setattr("crysforge.trainer.evaluation.statistics._CHUNK", 64)
    assert paired_bootstrap(x, y, "a", 101) == whole


def test_bootstrap_interval_is_the_normal_one_for_many_crystals():
    d = np.random.default_rng(2).normal(0.1, 1, 2000)
    found = paired_bootstrap(d, np.zeros(2000), "a", 4000)
    half = 1.96 * d.std() / 2000**0.5
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half), abs=5e-3)


def test_intervals_cover_what_they_promise():
    draw = np.random.default_rng(3)
    t = [summarise(x, 0.9) for x in draw.normal(5, 2, (600, 4))]
    assert np.mean([s.low <= 5 <= s.high for s in t]) == pytest.approx(0.9, abs=0.035)
    errors = draw.exponential(1, (2, 300, 80))
    b = [paired_bootstrap(x, y, "k", 300, 0.9) for x, y in zip(*errors, strict=True)]
    assert np.mean([s.low <= 0 <= s.high for s in b]) == pytest.approx(0.9, abs=0.05)


def test_p_values_are_uniform_where_nothing_differs():
    draw = np.random.default_rng(4)
    seeds = draw.normal(0, 1, (2, 400, 5))
    t = [paired_test(x, y).p for x, y in zip(*seeds, strict=True)]
    errors = draw.exponential(1, (2, 300, 80))
    b = [
        paired_bootstrap(x, y, str(i), 400).p for i, (x, y) in enumerate(zip(*errors, strict=True))
    ]
    for p in (t, b):
        assert stats.kstest(p, "uniform").statistic < 0.09


def test_holm_known_values_and_bounds():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, float("nan"), 0.5])[::2] == pytest.approx([1, 1])
    assert math.isnan(holm([0.9, float("nan")])[1])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.randoms())
def test_holm_keeps_order_and_never_lowers(p, random):
    adjusted = holm(p)
    assert all(0 <= a <= 1 and a >= x for a, x in zip(adjusted, p, strict=True))
    assert all(a <= min(1, len(p) * x) + 1e-12 for a, x in zip(adjusted, p, strict=True))
    order = list(range(len(p)))
    random.shuffle(order)
    assert holm([p[i] for i in order]) == pytest.approx([adjusted[i] for i in order])


def test_improvement_in_percent_of_the_baseline():
    assert improvement(0.15, 0.2) == pytest.approx(25)
    assert improvement(0.3, 0.2) == pytest.approx(-50)
    assert math.isnan(improvement(1, 0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: summarise([]),
        lambda: summarise([1, float("nan")]),
        lambda: summarise([1, 2], 1.0),
        lambda: paired_test([1, 2], [1]),
        lambda: paired_bootstrap(np.ones(2), np.ones(3), "k"),
        lambda: paired_bootstrap(np.ones(0), np.ones(0), "k"),
        lambda: paired_bootstrap(np.ones(2), np.ones(2), "k", 0),
    ],
)
def test_what_cannot_be_compared_is_refused(call):
    with pytest.raises(ValueError):
        call()
