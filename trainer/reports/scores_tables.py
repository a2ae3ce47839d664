"""Tables of scores: every arm with its errors, intervals and what is missing."""

from __future__ import annotations

from collections.abc import Sequence

from crysforge.trainer.evaluation.compare import (
    Arm,
    varying,
)
from crysforge.trainer.evaluation.published import (
    Published,
)
from crysforge.trainer.evaluation.results import Missing
from crysforge.trainer.evaluation.statistics import NAN, one_sample_p
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
from crysforge.trainer.reports.tables import COMPOSITION, MORE, constants, spread_of


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
    more = [m for m in MORE if any(a.scores(m) for a in arms)]
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
        entries += [spread_of(arm, m, digits if m == "rmse" else 3) for m in ("rmse", "r2", *more)]
        entries += [
            Number(arm.mean(lambda r: r.scores["val_mae"]), digits),
            *(Number(arm.composition(k), digits) for k in COMPOSITION),
        ]
        if published:
            value = known.value(arm, suite.compared)
            entries.append(Number(value[0] if value else NAN, digits))
            entries.append(PValue(one_sample_p(arm.scores("mae"), value[0]) if value else NAN))
        body.append([*entries, Number(arm.mean(lambda r: r.seconds) / 60, 1)])
    columns = [
        *factors, "unit", "n", "MAE", f"MAE {percent} CI", "RMSE", "R²", *more, "validation MAE",
        *COMPOSITION.values(),
        *(["published", "p against it"] if published else []), "minutes",
    ]  # fmt: skip
    title = f"{suite.title}: scores on the {split} split"
    return Table("scores", title, columns, body, len(factors) + 1, constants(arms))


def missing_table(missing: Sequence[Missing]) -> Table:
    """Runs without results, and why."""
    runs = {m.run.name: m.reason for m in missing}
    rows: list[list[Entry]] = [[name, reason] for name, reason in runs.items()]
    return Table("missing", "Runs without results", ["run", "reason"], rows, 2)
