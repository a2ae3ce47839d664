"""Statistics of replicates and of crystals: intervals, paired tests, bootstrap, Holm's correction.

Two questions are kept apart. Whether training again would give the same order is asked of the
replicates (seeds): the paired t test. Whether another test set would is asked of the crystals: the
paired bootstrap, given the models as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NAN = float("nan")
WILCOXON_FROM = 6
"""Fewest pairs whose signed ranks can differ at the 5 % level (smallest p = 2 · 2^-n)."""
_CHUNK = 1 << 22
"""Draws of the bootstrap that are held in memory at a time."""


@dataclass(frozen=True)
class Summary:
    """Replicates of one number."""

    n: int
    mean: float
    std: float
    """Sample standard deviation (n - 1); NaN of a single replicate."""
    low: float
    high: float
    """Confidence interval of the mean, mean ± t · std / √n."""


@dataclass(frozen=True)
class PairedTest:
    """Whether two arms differ over the replicates that both have."""

    n: int
    difference: float
    """Mean of arm - baseline; negative where the arm has the lower error."""
    low: float
    high: float
    """Confidence interval of the difference, from Student's t."""
    p: float
    """Two-sided paired t test; NaN of fewer than two pairs."""
    p_wilcoxon: float
    """Two-sided Wilcoxon signed-rank test; NaN of fewer than `WILCOXON_FROM` pairs."""


@dataclass(frozen=True)
class Bootstrap:
    """Whether two arms differ over crystals drawn anew."""

    n: int
    """Crystals."""
    difference: float
    """Mean of arm - baseline over the crystals."""
    low: float
    high: float
    """Percentile interval of the difference."""
    p: float
    """Two-sided: twice the share of resamples on the rarer side of zero, at most 1."""


def summarise(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, spread and confidence interval of replicates.

    Raises:
        ValueError: no value, one that is not finite, or a confidence outside (0, 1).
    """
    x = _finite(values)
    if len(x) == 0:
        raise ValueError("no replicate to summarise")
    mean = float(x.mean())
    if len(x) == 1:
        _check(confidence)
        return Summary(1, mean, NAN, NAN, NAN)
    std = float(x.std(ddof=1))
    half = _quantile(len(x), confidence) * std / len(x) ** 0.5
    return Summary(len(x), mean, std, mean - half, mean + half)


def paired_test(
    arm: Sequence[float],
    baseline: Sequence[float],
    confidence: float = 0.95,
    overlap: float = 0.0,
) -> PairedTest:
    """Tests arm - baseline, paired by replicate, both [n].

    Folds of one data set are no independent replicates: most of their training crystals are the
    same. With `overlap`, the ratio of test to training crystals, their variance of the mean is
    s²·(1/n + overlap) instead of s²/n (the corrected resampled t test of Nadeau and Bengio, Machine
    Learning 52, 239, 2003); Wilcoxon's test, for which there is no such correction, is left out.

    With few replicates these tests have little power: of two pairs, the t test calls a
    difference significant at 5 % only where it is 9 times its standard deviation.

    Raises:
        ValueError: lengths that differ, no pair, or values that are not finite.
    """
    from scipy import stats

    x, y = _finite(arm), _finite(baseline)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} replicates cannot be paired with {len(y)}")
    found = summarise(x - y, confidence)
    wider = (1 + found.n * overlap) ** 0.5
    p = _t_test(found.mean, found.std * wider, found.n)
    signed = NAN
    if found.n >= WILCOXON_FROM and not overlap:
        signed = float(stats.wilcoxon(x - y).pvalue) if np.any(x != y) else 1.0
    half = wider * (found.high - found.mean)
    return PairedTest(found.n, found.mean, found.mean - half, found.mean + half, p, signed)


def one_sample_p(values: Sequence[float], reference: float) -> float:
    """Two-sided p of a one-sample t test against a fixed value; NaN of fewer than two values.

    Source: what Table 9 of the CrysLDNet paper calls a paired t test against its baselines.
    """
    found = summarise(values)
    return _t_test(found.mean - reference, found.std, found.n)


def paired_bootstrap(
    arm: np.ndarray,
    baseline: np.ndarray,
    key: str,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Bootstrap:
    """Draws crystals with replacement and compares the mean errors of two arms on them.

    Args:
        arm, baseline: [n] absolute errors of the same crystals (means over seeds where there are
            several).
        key: what the draws depend on, beside n; with one key, swapping the arms changes signs.

    Raises:
        ValueError: lengths that differ, no crystal, values that are not finite, no resample.
    """
    x, y = _finite(arm), _finite(baseline)
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"errors of {len(x)} and {len(y)} crystals cannot be paired")
    if resamples < 1:
        raise ValueError(f"resamples must be positive, got {resamples}")
    _check(confidence)
    difference, n = x - y, len(x)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    draw = np.random.default_rng(int.from_bytes(digest, "little"))
    rows = max(1, _CHUNK // n)
    means = np.concatenate(
        [
            difference[draw.integers(0, n, (min(rows, resamples - i), n))].mean(axis=1)
            for i in range(0, resamples, rows)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    rarer = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    p = min(1.0, 2 * (1 + int(rarer)) / (1 + resamples))
    return Bootstrap(n, float(difference.mean()), float(low), float(high), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values that hold together for all comparisons made. NaN (no
    test) stays NaN and does not count."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(p), NAN)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return adjusted.tolist()


def improvement(error: float, baseline: float) -> float:
    """How much lower an error is than the baseline's, in % of the baseline's; NaN of 0."""
    return 100 * (baseline - error) / baseline if baseline else NAN


def _t_test(mean: float, std: float, n: int) -> float:
    """Two-sided p of a mean against 0."""
    from scipy import stats

    if n < 2:
        return NAN
    if std == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / (std / n**0.5), n - 1))


def _quantile(n: int, confidence: float) -> float:
    from scipy import stats

    _check(confidence)
    return float(stats.t.ppf(0.5 + confidence / 2, n - 1))


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if not np.isfinite(x).all():
        raise ValueError("a replicate or error is not a finite number")
    return x
