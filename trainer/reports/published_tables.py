"""Published numbers beside ours, as a table; and a whole paper at a glance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from crysforge.trainer.evaluation.compare import (
    Arm,
    Key,
    arms_of,
    most_labels,
    varying,
)
from crysforge.trainer.evaluation.exhibits import Exhibit, exhibits
from crysforge.trainer.evaluation.published import (
    ANY,
    ENCODER,
    OWN,
    PRETRAINING,
    Published,
    PublishedTable,
    model_of,
    published,
)
from crysforge.trainer.evaluation.results import gather
from crysforge.trainer.evaluation.statistics import NAN
from crysforge.trainer.evaluation.suite import SUITE, Suite
from crysforge.trainer.reports.config import EvaluateConfig
from crysforge.trainer.reports.formats import (
    NOTHING,
    Entry,
    Number,
    Table,
    places,
)
from crysforge.trainer.reports.tables import mae_of


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
    digits = {t: places([a.mean(mae_of) for a in ours if a.key(task_factors) == t]) for t in tasks}
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


def overview(config: EvaluateConfig, data_sets: Callable[[str], Mapping[str, bool]]) -> str:
    """Every table and figure of a paper: the command that makes it, what is there and what is
    missing, published numbers with ours beside.

    Args:
        data_sets: (name of a suite) → its data sets, and whether they are there.

    Raises:
        ValueError: an unknown paper.
    """
    parts = []
    for shown in exhibits(config.paper):
        parts.append(f"## {shown.exhibit}: {shown.what}")
        parts.append("\n".join(f"    {command}" for command in shown.commands(config.runs)))
        if shown.suite:
            parts.append("\n".join(_state(shown, config, data_sets(shown.suite))))
        parts += [f"To know: {shown.lacks}."] if shown.lacks else []
        parts += [table.markdown() for table in _beside(shown, config)]
    return "\n\n".join(filter(None, parts))


def _state(shown: Exhibit, config: EvaluateConfig, here: Mapping[str, bool]) -> list[str]:
    """Data sets and runs of an exhibit's suite."""
    absent = [name for name, there in here.items() if not there]
    lines = [f"Data sets: {len(here) - len(absent)} of {len(here)} are here"]
    lines[0] += f"; missing: {', '.join(absent)}." if absent else "."
    root = Path(config.runs) / shown.suite
    if not (root / SUITE).is_file():
        return [*lines, f"Runs: none in {root}."]
    suite = Suite.read(root)
    _, missing = gather(suite, config.split)
    names = {m.run.name for m in missing}
    done = len(suite.evaluated) - len(names)
    return [*lines, f"Runs: {done} of {len(suite.evaluated)} finetunings in {root} have finished."]


def _beside(shown: Exhibit, config: EvaluateConfig) -> list[Table]:
    """The published tables of an exhibit, with ours beside."""
    known = published()
    root = Path(config.runs) / shown.suite
    if shown.suite and (root / SUITE).is_file():
        suite = Suite.read(root)
        arms = arms_of(suite, *gather(suite, config.split))
    else:
        suite, arms = Suite(root, shown.exhibit, [], []), []
    tables = [t for key in shown.tables or [] for t in known.tables if t.key == key]
    chosen = [
        replace(t, properties=[p for p in t.properties if p.key.startswith(shown.data)])
        for t in tables
    ]
    return [published_table(suite, arms, known, table) for table in chosen]
