"""The tables of a report: results, scores, comparisons, missing cells, published numbers beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

from crysforge.trainer.evaluation.compare import (
    Arm,
    Comparison,
    Key,
    mean_improvements,
    most_labels,
    varying,
)
from crysforge.trainer.evaluation.formats import (
    NOTHING,
    Entry,
    Interval,
    Number,
    PValue,
    Table,
    places,
)
from crysforge.trainer.evaluation.published import (
    ANY,
    ENCODER,
    OWN,
    PRETRAINING,
    Published,
    PublishedTable,
    model_of,
)
from crysforge.trainer.evaluation.results import Missing
from crysforge.trainer.evaluation.statistics import NAN, Summary, one_sample_p
from crysforge.trainer.evaluation.suite import Suite

FEW = 6
"""Replicates below which a test over them is called weak."""
_MORE = ("accuracy", "f1", "roc_auc")
_COMPOSITION = {"mean": "mean label", "ridge": "composition ridge"}
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
    others = [h for h in heads if h != suite.baseline] if side_by_side and comparisons else []
    by_arm = {id(c.arm): c for c in comparisons}
    printed = {id(a): found for a in arms if (found := known.value(a, suite.compared))}
    beside = [h for h in heads if any(id(a) in printed for a in arms if _head(a, column) == h)]
    kinds = _COMPOSITION if side_by_side else {}
    body: list[list[Entry]] = []
    for key, line in grid.items():
        entries: list[Entry] = [*key]
        if several and side_by_side:
            entries.append(_unit([*line.values()]))
        entries += [means[id(line[h])] if h in line else "" for h in heads]
        for head in others:
            entries += _gain(by_arm.get(id(line.get(head))), alone=len(others) == 1)
        shown = [a for a in line.values() if a.results]
        digits = places([a.mean(_mae) for a in shown])
        entries += [Number(shown[0].composition(k) if shown else NAN, digits) for k in kinds]
        for head in beside:
            value = printed.get(id(line.get(head)), (NAN, ""))[0]
            entries.append(Number(value, places([value])))
        body.append(entries)
    titles = [h or "MAE" for h in heads]
    if several and not side_by_side:
        titles = [f"{h} ({u})" if u else h for h, u in zip(heads, units, strict=True)]
    columns = [
        *rows,
        *(["unit"] if several and side_by_side else []),
        *titles,
        *(["gain / %", "p (seeds)", "p (crystals)"] if len(others) == 1
          else [f"{h}: gain / %" for h in others]),
        *kinds.values(),
        *(f"{h}, published" if h else "published" for h in beside),
    ]  # fmt: skip
    unit = f" in {units[0]}" if units and units[0] and not several else ""
    by = f" by {column}" if column else ""
    title = f"{suite.title}: {split} MAE{unit}{by}, mean ± standard deviation over seeds"
    named = len(rows) + (several and side_by_side)
    return Table("results", title, columns, body, named, _constants(arms))


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


def scores_table(
    suite: Suite,
    arms: Sequence[Arm],
    known: Published,
    split: str = "test",
    confidence: float = 0.95,
) -> Table:
    """Every arm with all its scores."""
    factors = varying(arms) or list(arms[0].values)[:1]
    percent = f"{100 * confidence:g} %"
    more = [m for m in _MORE if any(a.scores(m) for a in arms)]
    published = any(known.value(a, suite.compared) for a in arms)
    body: list[list[Entry]] = []
    for arm in arms:
        found = arm.summary("mae", confidence)
        unit = arm.first.unit if arm.results else ""
        n = f"{len(arm.results)} of {arm.planned}" if arm.missing else len(arm.results)
        entries: list[Entry] = [*arm.key(factors), unit, n]
        if found is None:
            entries += [NOTHING] * (7 + len(more) + 2 * published)
            body.append([*entries, NOTHING])
            continue
        digits = places([found.mean], 4)
        entries += [Number(found.mean, digits, found.std), Interval(found.low, found.high, digits)]
        entries += [_spread(arm, m, digits if m == "rmse" else 3) for m in ("rmse", "r2", *more)]
        entries += [
            Number(arm.mean(lambda r: r.scores["val_mae"]), digits),
            *(Number(arm.composition(k), digits) for k in _COMPOSITION),
        ]
        if published:
            value = known.value(arm, suite.compared)
            entries.append(Number(value[0] if value else NAN, digits))
            entries.append(PValue(one_sample_p(arm.scores("mae"), value[0]) if value else NAN))
        body.append([*entries, Number(arm.mean(lambda r: r.seconds) / 60, 1)])
    columns = [
        *factors, "unit", "n", "MAE", f"MAE {percent} CI", "RMSE", "R²", *more, "validation MAE",
        *_COMPOSITION.values(),
        *(["published", "p against it"] if published else []), "minutes",
    ]  # fmt: skip
    title = f"{suite.title}: scores on the {split} split"
    return Table("scores", title, columns, body, len(factors) + 1, _constants(arms))


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


def missing_table(missing: Sequence[Missing]) -> Table:
    """Cells without results, and why."""
    cells = {m.cell.name: m.reason for m in missing}
    rows: list[list[Entry]] = [[name, reason] for name, reason in cells.items()]
    return Table("missing", "Cells without results", ["cell", "reason"], rows, 2)


def published_table(
    suite: Suite, arms: Sequence[Arm], known: Published, table: PublishedTable
) -> Table:
    """A published table with our numbers beside: one column for each task of ours, then the
    published properties of the same quantities (all of them where there are none)."""
    ours = [a for a in most_labels(arms) if a.results]
    model = {ENCODER, "encoder.name", PRETRAINING, suite.compared}
    task_factors = varying(ours, model)
    tasks = list(dict.fromkeys(a.key(task_factors) for a in ours))
    by_place = {(*model_of(a, suite.compared), a.key(task_factors)): a for a in ours}
    exact = {known.property_of(a, table.properties) for a in ours}
    sets = {p.data for p in exact if p} if None not in exact else set()
    columns = [
        p
        for p in table.properties
        if any(known.means(a.first.target, a.first.unit, p) for a in ours)
        and (not sets or p.data in sets)
    ] or table.properties
    rows = [r for r in table.rows if any(p.key in r.mae for p in columns)]
    models = list(dict.fromkeys(model_of(a, suite.compared) for a in ours))
    lines = [(m, [r for r in rows if r.is_of(*m)]) for m in models]
    mine = {id(r) for _, found in lines for r in found}
    heads = {t: _task(next(a for a in ours if a.key(task_factors) == t), t) for t in tasks}
    digits = {t: places([a.mean(_mae) for a in ours if a.key(task_factors) == t]) for t in tasks}
    body: list[list[Entry]] = []
    for (encoder, pretraining), found in lines:
        entries: list[Entry] = [encoder, pretraining]
        for task in tasks:
            arm = by_place.get((encoder, pretraining, task))
            summary = arm.summary() if arm else None
            entries.append(Number(summary.mean, digits[task], summary.std) if summary else NOTHING)
        body.append([*entries, *(_printed(found, p.key) for p in columns)])
    for row in rows:
        if id(row) not in mine:
            name = {OWN: "its own", ANY: "not said"}.get(row.encoder, row.encoder)
            body.append([name, row.pretraining, *[NOTHING] * len(tasks),
                         *(_printed([row], p.key) for p in columns)])  # fmt: skip
    head = [ENCODER, PRETRAINING, *(f"ours: {heads[t]}" for t in tasks),
            *(f"{p.title} ({p.unit})" if p.unit else p.title for p in columns)]  # fmt: skip
    notes = [table.note] if table.note else []
    if None in exact:
        notes.append(
            "Ours are on other data, or on another number of labels, than the published numbers: "
            "compare the order of the rows, not the values."
        )
    return Table(table.key, f"{table.source}, with ours beside (MAE)", head, body, 2, notes)


def _task(arm: Arm, key: Key) -> str:
    """A task of ours for the head of a column."""
    name = ", ".join(key) or arm.first.target
    return f"{name} ({arm.first.unit})" if arm.first.unit else name


def _printed(rows: Sequence, key: str) -> Entry:
    values = [(r.mae[key], r.std.get(key, NAN)) for r in rows if key in r.mae]
    if not values:
        return NOTHING
    value, std = values[0]
    digits = max(len(f"{x:g}".partition(".")[2]) for x in (value, std) if math.isfinite(x))
    return Number(value, max(3, digits) if value < 1 else digits, std)


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


def _mae(result) -> float:
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


def _spread(arm: Arm, metric: str, digits: int) -> Entry:
    found = arm.summary(metric)
    return Number(found.mean, digits, found.std) if found else NOTHING


def _constants(arms: Sequence[Arm]) -> list[str]:
    """A note on factors that have one value throughout."""
    several = varying(arms)
    fixed = {f: v for f, v in arms[0].values.items() if f not in several and v}
    if "encoder" not in arms[0].values and "encoder.name" not in arms[0].values:
        encoders = {r.encoder for r in chain(*(a.results.values() for a in arms))}
        fixed |= {"encoder": encoders.pop()} if len(encoders) == 1 else {}
    text = ", ".join(f"{f}={v}" for f, v in fixed.items())
    return [f"Throughout: {text}."] if text else []
