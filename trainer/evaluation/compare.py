"""Arms of a suite, each of several replicates, and how they compare with the baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from crysforge.trainer.evaluation.results import Missing, Result
from crysforge.trainer.evaluation.statistics import (
    NAN,
    Bootstrap,
    PairedTest,
    Summary,
    holm,
    improvement,
    paired_bootstrap,
    paired_test,
    summarise,
)
from crysforge.trainer.evaluation.suite import SEED, TARGET, Suite, shown

Key = tuple[str, ...]
"""Values of some factors, as shown."""


@dataclass
class Arm:
    """Runs that differ in their seed alone."""

    values: dict[str, str]
    """Value of every factor but the seed, as shown."""
    results: dict[str, Result] = field(default_factory=dict)
    """By seed."""
    missing: dict[str, Missing] = field(default_factory=dict)
    """By seed."""

    @property
    def planned(self) -> int:
        """Replicates, finished or not."""
        return len(self.results) + len(self.missing)

    @property
    def first(self) -> Result:
        """Any of the results, for what they share."""
        return next(iter(self.results.values()))

    def key(self, factors: Iterable[str]) -> Key:
        """Its values of these factors."""
        return tuple(self.values[f] for f in factors)

    def scores(self, metric: str) -> list[float]:
        """One score of every replicate that has it."""
        found = (r.scores.get(metric, NAN) for r in self.results.values())
        return [x for x in found if np.isfinite(x)]

    def summary(self, metric: str = "mae", confidence: float = 0.95) -> Summary | None:
        """A score over the replicates; None without any."""
        values = self.scores(metric)
        return summarise(values, confidence) if values else None

    def mean(self, of: Callable[[Result], float]) -> float:
        """Mean of a number over the replicates that have it; NaN without any."""
        values = [x for x in map(of, self.results.values()) if np.isfinite(x)]
        return float(np.mean(values)) if values else NAN

    def composition(self, kind: str) -> float:
        """MAE of a predictor that sees the composition only, mean over the replicates."""
        return self.mean(lambda r: r.composition.get(kind, NAN))


@dataclass
class Comparison:
    """An arm beside the baseline's arm with the same other factors, paired by seed and crystal."""

    arm: Arm
    baseline: Arm
    seeds: list[str]
    """Replicates that both arms have finished."""
    left_out: list[str]
    """Runs that are left out since their seed has no partner."""
    improvement: float
    """In % of the baseline's MAE, over the pairs."""
    test: PairedTest | None
    bootstrap: Bootstrap | None
    notes: list[str] = field(default_factory=list)
    p_holm: float = NAN
    """The t test's p, corrected for all comparisons of the suite."""
    bootstrap_p_holm: float = NAN


def arms_of(suite: Suite, results: Sequence[Result], missing: Sequence[Missing]) -> list[Arm]:
    """The arms of a suite, in the order of its runs.

    Raises:
        ValueError: two runs with the same values, or different targets or data in one arm.
    """
    arms: dict[Key, Arm] = {}
    found_or_not: list[Result | Missing] = [*results, *missing]
    several = [TARGET] if any(TARGET in r.values for r in found_or_not) else []
    names = [f for f in dict.fromkeys([*suite.factors, *several]) if f != SEED]
    order = {run.name: i for i, run in enumerate(suite.runs)}
    for found in sorted(found_or_not, key=lambda r: order[r.run.name]):
        values = {f: shown(found.values.get(f)) for f in names}
        arm = arms.setdefault(tuple(values.values()), Arm(values))
        seed = shown(found.values.get(SEED))
        twin = arm.results.get(seed) or arm.missing.get(seed)
        if twin is not None:
            raise ValueError(
                f"runs {twin.run.name!r} and {found.run.name!r} have the same values: "
                f"{values | {SEED: seed}}; a factor that tells them apart is missing"
            )
        if isinstance(found, Missing):
            arm.missing[seed] = found
            continue
        if arm.results and (arm.first.target, arm.first.unit) != (found.target, found.unit):
            raise ValueError(
                f"runs {arm.first.run.name!r} and {found.run.name!r} have the same values but "
                f"predict {arm.first.target!r} and {found.target!r}"
            )
        arm.results[seed] = found
    return list(arms.values())


def varying(arms: Sequence[Arm], leave_out: Iterable[str] = ()) -> list[str]:
    """Factors that have more than one value among the arms."""
    factors = arms[0].values if arms else {}
    several = (f for f in factors if len({a.values[f] for a in arms}) > 1)
    return [f for f in several if f not in leave_out]


def lines_of(suite: Suite, arms: Sequence[Arm]) -> list[list[Arm]]:
    """Arms with results that differ in the compared factor alone."""
    factors = varying(arms, [suite.compared])
    lines: dict[Key, list[Arm]] = {}
    for arm in arms:
        if arm.results:
            lines.setdefault(arm.key(factors), []).append(arm)
    return list(lines.values())


def most_labels(arms: Sequence[Arm]) -> list[Arm]:
    """Arms with as many labels as any of the same data and target."""
    most: dict[tuple[str, str], int] = {}
    for arm in arms:
        if arm.results:
            task = (arm.first.fingerprint, arm.first.target)
            most[task] = max(most.get(task, 0), arm.first.labels)
    return [
        a for a in arms if a.results and a.first.labels == most[a.first.fingerprint, a.first.target]
    ]


def title_of(arm: Arm, factors: Iterable[str]) -> str:
    """Its values of these factors, for titles; numbers say of what they are."""
    words = ((f, arm.values[f]) for f in factors if arm.values[f])
    named = (f"{f} {v}" if v.replace(".", "").isdigit() else v for f, v in words)
    return ", ".join(named) or arm.first.target


def compare(
    suite: Suite, arms: Sequence[Arm], resamples: int = 10_000, confidence: float = 0.95
) -> list[Comparison]:
    """Every arm beside its baseline, with Holm's correction over all of them; empty where the
    suite compares nothing."""
    if not suite.compared:
        return []
    others = [f for f in (arms[0].values if arms else {}) if f != suite.compared]
    baselines = {a.key(others): a for a in arms if a.values[suite.compared] == suite.baseline}
    found = [
        compare_arms(arm, baselines[arm.key(others)], resamples, confidence, suite.folds)
        for arm in arms
        if arm.values[suite.compared] != suite.baseline and arm.key(others) in baselines
    ]
    for comparison, p, q in zip(
        found,
        holm([c.test.p if c.test else NAN for c in found]),
        holm([c.bootstrap.p if c.bootstrap else NAN for c in found]),
        strict=True,
    ):
        comparison.p_holm, comparison.bootstrap_p_holm = p, q
    return found


def compare_arms(
    arm: Arm, baseline: Arm, resamples: int, confidence: float, folds: bool = False
) -> Comparison:
    """One comparison of MAEs. Replicates without a partner are left out and named.

    Args:
        folds: whether replicates are folds of one data set.
    """
    seeds = [s for s in baseline.results if s in arm.results]
    alone = [r for a, b in ((arm, baseline), (baseline, arm)) for s, r in a.results.items()
             if s not in b.results]  # fmt: skip
    comparison = Comparison(arm, baseline, seeds, [r.run.name for r in alone], NAN, None, None)
    if not seeds:
        return comparison
    ours, theirs = ([a.results[s].scores["mae"] for s in seeds] for a in (arm, baseline))
    comparison.improvement = improvement(float(np.mean(ours)), float(np.mean(theirs)))
    runs_of = [arm.results[s] for s in seeds]
    shares = [len(r.predictions.ids) / r.labels if r.labels else 0.0 for r in runs_of]
    overlap = np.mean(shares) if folds else 0.0
    comparison.test = paired_test(ours, theirs, confidence, float(overlap))
    pairs: dict[str, list[tuple[float, float]]] = {}  # of each crystal, in replicates that have it
    for seed in seeds:
        runs = [a.results[seed] for a in (arm, baseline)]
        known, other = (r.predictions.error_of for r in runs)
        if runs[0].fingerprint != runs[1].fingerprint:
            comparison.notes.append(f"seed {seed}: the runs' data sets differ")
        if known.keys() != other.keys():
            common = len(known.keys() & other.keys())
            comparison.notes.append(f"seed {seed}: {common} crystals in common")
        for id in known.keys() & other.keys():
            pairs.setdefault(id, []).append((known[id], other[id]))
    if pairs:
        errors = np.array([np.mean(pairs[id], axis=0) for id in sorted(pairs)])
        key = f"{arm.first.target}/{min(pairs)}"
        comparison.bootstrap = paired_bootstrap(
            errors[:, 0], errors[:, 1], key, resamples, confidence
        )
    return comparison


def mean_improvements(
    comparisons: Sequence[Comparison], compared: str
) -> dict[str, tuple[float, int]]:
    """Unweighted mean improvement in % of each compared value, and over how many rows."""
    by_value: dict[str, list[float]] = {}
    for c in comparisons:
        if np.isfinite(c.improvement):
            by_value.setdefault(c.arm.values[compared], []).append(c.improvement)
    return {value: (float(np.mean(x)), len(x)) for value, x in by_value.items()}
