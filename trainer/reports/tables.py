"""The tables of a report: results, scores, comparisons, missing runs, published numbers beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from crysforge.trainer.evaluation.compare import (
    Arm,
    Comparison,
    Key,
    mean_improvements,
    varying,
)
from crysforge.trainer.evaluation.published import (
    Published,
)
from crysforge.trainer.evaluation.results import Result
from crysforge.trainer.evaluation.statistics import NAN, Summary
from crysforge.trainer.evaluation.suite import Suite
from crysforge.trainer.reports.formats import (
    NOTHING,
    Entry,
    Interval,
    Number,
    PValue,
    Table,
    places,
)

FEW = 6
"""Replicates below which a test over them is called weak."""
MORE = ("accuracy", "f1", "roc_auc")
COMPOSITION = {"mean": "mean label", "ridge": "composition ridge"}
"""Predictors that see the composition only."""
_PERCENT = 1
"""Decimal places of percentages."""


def results_table(
    suite: Suite,
    arms: Sequence[Arm],
    comparisons: Sequence[Comparison],
    known: Published,
    split: str = "test",
    rows: Sequence[str] = (),
    column: str = "",
) -> Table:
    """MAE as mean ± standard deviation, one column for each value of a factor.

    Args:
        rows: factors that name the rows; default all that vary but `column`.
        column: default the compared factor, else the last that varies.

    Raises:
        ValueError: an unknown factor, or factors that leave several arms to one entry.
    """
    column = _column(suite, arms, column)
    rows = list(rows) or varying(arms, [column])
    _check_factors(arms, [*rows, column])
    heads = list(dict.fromkeys(_head(a, column) for a in arms))
    grid = _grid(arms, rows, column)
    side_by_side = column in ("", suite.compared)  # the arms of a row are of one task
    if side_by_side:
        peers = [[*line.values()] for line in grid.values()]
    else:
        peers = [[line[h] for line in grid.values() if h in line] for h in heads]
    means: dict[int, Number] = {}
    for group in peers:
        means |= _means(group, bold=side_by_side or rows == [suite.compared])
    units = [_unit(group) for group in peers]
    several = len(set(units)) > 1
    gains = _Gains(suite, comparisons, heads if side_by_side else [])
    beside = _Beside(suite, arms, heads, column, known)
    kinds = COMPOSITION if side_by_side else {}
    body: list[list[Entry]] = []
    for key, line in grid.items():
        entries: list[Entry] = [*key]
        if several and side_by_side:
            entries.append(_unit([*line.values()]))
        entries += [means[id(line[h])] if h in line else "" for h in heads]
        entries += gains.of(line)
        shown = [a for a in line.values() if a.results]
        digits = places([a.mean(mae_of) for a in shown])
        entries += [Number(shown[0].composition(k) if shown else NAN, digits) for k in kinds]
        body.append([*entries, *beside.of(line)])
    titles = [h or "MAE" for h in heads]
    if several and not side_by_side:
        titles = [f"{h} ({u})" if u else h for h, u in zip(heads, units, strict=True)]
    unit_column = ["unit"] if several and side_by_side else []
    columns = [*rows, *unit_column, *titles, *gains.titles, *kinds.values(), *beside.titles]
    unit = f" in {units[0]}" if units and units[0] and not several else ""
    by = f" by {column}" if column else ""
    title = f"{suite.title}: {split} MAE{unit}{by}, mean ± standard deviation over seeds"
    return Table("results", title, columns, body, len(rows) + len(unit_column), constants(arms))


class _Gains:
    """Columns that say how much an arm gains on the baseline of its row."""

    def __init__(
        self, suite: Suite, comparisons: Sequence[Comparison], heads: Sequence[str]
    ) -> None:
        self.heads = [h for h in heads if h != suite.baseline] if comparisons else []
        self.by_arm = {id(c.arm): c for c in comparisons}
        self.titles = [f"{h}: gain / %" for h in self.heads]
        if len(self.heads) == 1:
            self.titles = ["gain / %", "p (seeds)", "p (crystals)"]

    def of(self, line: Mapping[str, Arm]) -> list[Entry]:
        """The entries of a row."""
        alone = len(self.heads) == 1
        found = [self.by_arm.get(id(line.get(head))) for head in self.heads]
        return [entry for each in found for entry in _gain(each, alone=alone)]


class _Beside:
    """Columns of published values, for the heads that have one."""

    def __init__(
        self, suite: Suite, arms: Sequence[Arm], heads: Sequence[str], column: str, known: Published
    ) -> None:
        values = {id(a): known.value(a, suite.compared) for a in arms}
        self.values = {arm: found[0] for arm, found in values.items() if found}
        with_value = {_head(a, column) for a in arms if id(a) in self.values}
        self.heads = [h for h in heads if h in with_value]
        self.titles = [f"{h}, published" if h else "published" for h in self.heads]

    def of(self, line: Mapping[str, Arm]) -> list[Entry]:
        """The entries of a row."""
        found = [self.values.get(id(line.get(head)), NAN) for head in self.heads]
        return [Number(value, places([value])) for value in found]


def _grid(arms: Sequence[Arm], rows: Sequence[str], column: str) -> dict[Key, dict[str, Arm]]:
    """The arm of each row and column."""
    grid: dict[Key, dict[str, Arm]] = {}
    for arm in arms:
        line, head = grid.setdefault(arm.key(rows), {}), _head(arm, column)
        if head in line:
            more = [f for f in varying([line[head], arm]) if f not in rows]
            raise ValueError(f"rows={rows} and columns={column!r} leave out {', '.join(more)}")
        line[head] = arm
    return grid


def _head(arm: Arm, column: str) -> str:
    return arm.values[column] if column else ""


def comparisons_table(
    suite: Suite, arms: Sequence[Arm], comparisons: Sequence[Comparison], confidence: float = 0.95
) -> Table:
    """Every arm beside its baseline, with the tests."""
    factors = varying(arms)
    percent = f"{100 * confidence:g} %"
    body: list[list[Entry]] = []
    for c in comparisons:
        entries: list[Entry] = [*c.arm.key(factors), len(c.seeds)]
        test, draws = c.test, c.bootstrap
        if test is None:
            body.append([*entries, *[NOTHING] * 12])
            continue
        base, own = (
            sum(a.results[s].scores["mae"] for s in c.seeds) / len(c.seeds)
            for a in (c.baseline, c.arm)
        )
        digits = places([base, own], 4)
        entries += [Number(base, digits), Number(own, digits), Number(test.difference, digits)]
        entries += [Number(c.improvement, _PERCENT), Interval(test.low, test.high, digits)]
        entries += [PValue(test.p), PValue(c.p_holm), PValue(test.p_wilcoxon)]
        if draws is None:
            entries += [NOTHING] * 4
        else:
            entries += [draws.n, Interval(draws.low, draws.high, digits)]
            entries += [PValue(draws.p), PValue(c.bootstrap_p_holm)]
        body.append(entries)
    columns = [
        *factors, "pairs", "baseline MAE", "MAE", "difference", "gain / %", f"{percent} CI (seeds)",
        "p (t test)", "p (Holm)", "p (Wilcoxon)", "crystals", f"{percent} CI (crystals)",
        "p (bootstrap)", "bootstrap p (Holm)",
    ]  # fmt: skip
    means = mean_improvements(comparisons, suite.compared)
    notes = [
        f"Mean gain of {value} over {n} row{'s' * (n > 1)}: {mean:.1f} %."
        for value, (mean, n) in means.items()
    ]
    for c in comparisons:
        name = ", ".join(c.arm.key(factors))
        notes += [f"{name}: {note}." for note in c.notes]
        if c.left_out:
            notes.append(f"{name}: no partner, left out of the pairs: {', '.join(c.left_out)}.")
    if comparisons and min(len(c.seeds) for c in comparisons) < FEW:
        notes.append(
            f"With fewer than {FEW} seeds the tests over seeds have little power: a large p is no "
            "sign of equality."
        )
    title = f"{suite.title}: compared with {suite.compared}={suite.baseline}"
    return Table("comparisons", title, columns, body, len(factors), notes)


def _column(suite: Suite, arms: Sequence[Arm], column: str) -> str:
    several = varying(arms)
    return column or suite.compared or (several[-1] if several else "")


def _check_factors(arms: Sequence[Arm], factors: Sequence[str]) -> None:
    known = list(arms[0].values)
    for factor in factors:
        if factor and factor not in known:
            raise ValueError(
                f"{factor!r} is no factor to lay a table out by (seeds are replicates): "
                f"there are {', '.join(known) or 'none'}"
            )


def _unit(arms: Sequence[Arm]) -> str:
    return next((a.first.unit for a in arms if a.results), "")


def mae_of(result: Result) -> float:
    """The error that tables show."""
    return result.scores["mae"]


def places_with_spread(found: Sequence[Summary]) -> int:
    """Decimal places for three digits of the smallest mean, or four where the spread needs it."""
    means = [s.mean for s in found]
    return max(places(means), min(places(means, 4), places([s.std for s in found], 1)))


def _means(arms: Sequence[Arm], bold: bool) -> dict[int, Number]:
    """MAEs of arms that are shown with the same places; the lowest may be bold."""
    found = [arm.summary() for arm in arms]
    known = [s for s in found if s]
    best, digits = min((s.mean for s in known), default=NAN), places_with_spread(known)
    numbers = {}
    for arm, s in zip(arms, found, strict=True):
        suffix = f" ({len(arm.results)} of {arm.planned})" if arm.missing else ""
        strong = bold and len(known) > 1 and s is not None and s.mean == best
        mean, std = (s.mean, s.std) if s else (NAN, NAN)
        numbers[id(arm)] = Number(mean, digits, std, strong, suffix)
    return numbers


def _gain(comparison: Comparison | None, alone: bool) -> list[Entry]:
    if comparison is None:
        return [NOTHING] * (3 if alone else 1)
    gain = Number(comparison.improvement, _PERCENT)
    if not alone:
        return [gain]
    test, draws = comparison.test, comparison.bootstrap
    return [gain, PValue(test.p if test else NAN), PValue(draws.p if draws else NAN)]


def spread_of(arm: Arm, metric: str, digits: int) -> Entry:
    found = arm.summary(metric)
    return Number(found.mean, digits, found.std) if found else NOTHING


def constants(arms: Sequence[Arm]) -> list[str]:
    """A note on factors that have one value throughout."""
    several = varying(arms)
    fixed = {f: v for f, v in arms[0].values.items() if f not in several and v}
    if "encoder" not in arms[0].values and "encoder.name" not in arms[0].values:
        encoders = {r.encoder for r in chain(*(a.results.values() for a in arms))}
        fixed |= {"encoder": encoders.pop()} if len(encoders) == 1 else {}
    text = ", ".join(f"{f}={v}" for f, v in fixed.items())
    return [f"Throughout: {text}."] if text else []
