"""The report of a suite: statistics, tables and figures in one folder, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crysforge.datapipe.common.safe_names import in_markdown, slugs
from crysforge.trainer.base.tensors import (
    code_version,
    remove_tree,
    sync_directory,
    write_text,
)
from crysforge.trainer.evaluation import crystal_figures, figures
from crysforge.trainer.evaluation.compare import (
    Arm,
    arms_of,
    compare,
    lines_of,
    most_labels,
    title_of,
    varying,
)
from crysforge.trainer.evaluation.costs import costs_table
from crysforge.trainer.evaluation.crystals import Facts, atoms_table, facts_behind, facts_of
from crysforge.trainer.evaluation.formats import Table
from crysforge.trainer.evaluation.published import Published, published
from crysforge.trainer.evaluation.results import gather
from crysforge.trainer.evaluation.suite import Suite
from crysforge.trainer.evaluation.tables import (
    comparisons_table,
    missing_table,
    published_table,
    results_table,
    scores_table,
)

REPORT = "report.md"
_LABELS = ("label_fraction", "label_count")


@dataclass(kw_only=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    suite: str = ""
    """Directory of a suite, of a sweep that was submitted, or of runs."""
    output: str = ""
    """Where the report goes; default `report` in the suite's directory. A report there is
    replaced."""
    baseline: str = ""
    """`FACTOR=VALUE` that the factor's other values are compared with; default the suite's."""
    rows: list[str] = field(default_factory=list)
    """Factors that name the rows of the main table; default all that vary but `columns`."""
    columns: str = ""
    """Factor whose values are its columns; default the compared one."""
    split: str = "test"
    """`test` or `val`."""
    paper: str = ""
    """Published tables to set beside (`crysldnet-unified`, `dpf`, …); default the suite's."""
    data: list[str] = field(default_factory=list)
    """Where to look for data sets that are no longer where the runs found them."""
    confidence: float = 0.95
    """Of the intervals."""
    resamples: int = 10_000
    """Draws of the bootstrap over crystals."""
    figures: bool = True
    """Whether to draw."""
    space_groups: bool = True
    """Whether to look for the space group of every crystal (some milliseconds each)."""

    def __post_init__(self) -> None:
        if self.split not in ("test", "val"):
            raise ValueError(f"split must be test or val, got {self.split!r}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {self.confidence}")
        if self.resamples < 1:
            raise ValueError(f"resamples must be positive, got {self.resamples}")


@dataclass
class Report:
    """A written report."""

    path: Path
    main: Table
    missing: int
    """Cells without results."""


@dataclass
class Figure:
    """A drawn figure, by the name of its files."""

    name: str
    title: str
    kind: str
    of: str
    """What it shows."""


def evaluate(suite: Suite, config: EvaluateConfig) -> Report:
    """Writes the report of a suite.

    Raises:
        ValueError: nothing has finished, an unknown factor, value or paper, or an output that
            holds something else.
    """
    output = Path(config.output) if config.output else suite.root / "report"
    if output.exists() and not (output / REPORT).is_file():
        raise ValueError(f"{output} is there and is no report: give another output=DIR")
    if config.baseline:
        suite.compare_with(config.baseline)
    known = published().select(config.paper or suite.paper)
    results, missing = gather(suite, config.split)
    if not results:
        why = f"{missing[0].cell.name}: {missing[0].reason}" if missing else "it has no finetunings"
        raise ValueError(f"nothing to evaluate in {suite.root}: {why}")
    arms = arms_of(suite, results, missing)
    comparisons = compare(suite, arms, config.resamples, config.confidence)
    main = results_table(suite, arms, comparisons, known, config.split, config.rows, config.columns)
    tables = [main]
    if comparisons:
        tables.append(comparisons_table(suite, arms, comparisons, config.confidence))
    tables.append(scores_table(suite, arms, known, config.split, config.confidence))
    facts, notes = facts_of(results, config.data, config.split, config.space_groups)
    by_atoms = atoms_table(suite, arms, facts)
    tables += [by_atoms] if by_atoms.rows else []
    tables += [published_table(suite, arms, known, t) for t in known.tables]
    costs = costs_table(suite, known.costs)
    tables += [costs] if costs else []
    tables += [missing_table(missing)] if missing else []

    partial = output.with_name(f".{output.name}.partial")
    remove_tree(partial)
    (partial / "tables").mkdir(parents=True)
    for table in tables:
        table.write(partial / "tables")
    drawn: list[Figure] = []
    if config.figures:
        (partial / "figures").mkdir()
        drawn = _draw(suite, arms, facts, config, partial / "figures")
    cells = {m.cell.name for m in missing}
    text = _text(suite, tables, drawn, notes, known, config, len(suite.evaluated), len(cells))
    write_text(partial / REPORT, text)
    _replace(output, partial)
    return Report(output, main, len(cells))


def _replace(output: Path, partial: Path) -> None:
    """Puts a finished folder in its place; what was there goes when it stands."""
    old = output.with_name(f".{output.name}.old")
    remove_tree(old)
    if output.exists():
        os.rename(output, old)
    os.rename(partial, output)
    sync_directory(output.parent)
    remove_tree(old)


def _draw(
    suite: Suite, arms: Sequence[Arm], facts: dict[str, Facts], config: EvaluateConfig, folder: Path
) -> list[Figure]:
    """All figures of a report."""
    look = figures.Look(suite, arms)
    drawn: list[Figure] = []

    def path(kind: str, title: str, of: str = "") -> Path:
        """Where a figure goes: its kind and what it is of, no two figures the same."""
        others = [figure.of for figure in drawn if figure.kind == kind]
        part = slugs([of, *others])[0] if of else ""
        name = "-".join(filter(None, (kind, part)))
        drawn.append(Figure(name, title, kind, of))
        return folder / name

    factor = next((f for f in _LABELS if f in varying(arms)), "")
    others = varying(arms, [suite.compared, factor])
    lines = lines_of(suite, arms)
    if factor:
        curves: dict[str, list[Arm]] = {}
        for arm in arms:
            if arm.results:
                curves.setdefault(title_of(arm, others), []).append(arm)
        curves = {k: v for k, v in curves.items() if len({a.first.labels for a in v}) > 1}
        if curves:
            name = path("label_curves", "Error over the number of labels")
            figures.label_curves(curves, look, name, config.confidence)
    if suite.compared:
        tasks: dict[str, dict[str, list[Arm]]] = {}
        for line in lines:
            share = f"{factor} {line[0].values[factor]}" if factor else ""
            tasks.setdefault(share, {})[title_of(line[0], others)] = line
        for share, some in tasks.items():
            title = f"By {suite.compared}{f', {share}' if share else ''}"
            name = path("bars", title, share)
            figures.bars(some, look, name, config.confidence, title)
    most = {id(a) for a in most_labels(arms)}
    for line in lines:
        if id(line[0]) not in most:
            continue
        title = title_of(line[0], varying(arms, [suite.compared]))
        figures.parity(line, title, look, path("parity", f"Parity: {title}", title))
        known = facts_behind(line, facts)
        if known is None:
            continue
        if len(set(known.atoms.tolist())) > 1:
            name = path("atoms", f"Error by number of atoms: {title}", title)
            crystal_figures.by_atoms(line, known, title, look, name)
        name = path("elements", f"Error by element: {title}", title)
        crystal_figures.by_element(line, known, title, look, name)
        if config.space_groups:
            name = path("space_groups", f"Error by space group: {title}", title)
            crystal_figures.by_space_group(line, known, title, look, name)
    return drawn


def _text(
    suite: Suite,
    tables: Sequence[Table],
    drawn: Sequence[Figure],
    notes: Sequence[str],
    known: Published,
    config: EvaluateConfig,
    planned: int,
    missing: int,
) -> str:
    parts = [
        f"# {in_markdown(suite.title)}",
        f"{planned - missing} of {planned} finetunings have finished.",
    ]
    if missing:
        parts[-1] += " Those that have not are listed at the end and marked in the tables."
    parts += [f"Note: {note}." for note in notes]
    for table in tables:
        files = ", ".join(f"[{x}](tables/{table.name}.{x})" for x in ("md", "csv", "tex"))
        title = table.title.removeprefix(f"{suite.title}: ")
        parts += [
            in_markdown(f"## {title[0].upper()}{title[1:]}"),
            table.markdown(),
            f"Files: {files}",
        ]
    if known.improvements:
        parts.append("## Published mean gains over no pretraining")
        parts.append("\n".join(
            f"- {x['source']}, {x['what']}: {x['percent']:g} %"
            for x in known.improvements
        ))  # fmt: skip
    if drawn:
        parts.append("## Figures")
        for figure in drawn:
            file = f"figures/{figure.name}"
            title = in_markdown(figure.title)
            parts.append(f"### {title}\n\n![]({file}.png)\n\n[SVG]({file}.svg)")
    version = code_version()
    parts += [_METHODS.format(percent=f"{100 * config.confidence:g}", resamples=config.resamples)]
    parts += [f"Made by Crysforge {version['version']} (sources {version['sources']})."]
    return "\n\n".join(parts) + "\n"


_METHODS = """\
## How the numbers are made

- Errors are in the label's physical unit, of the model with the lowest validation MAE of its run \
(for several targets, the lowest squared error of standardised labels).
- ± is the sample standard deviation over seeds; the interval of a mean is mean ± t·s/√n \
at {percent} %.
- gain: how much lower the mean MAE is than the baseline's, over the seeds that both have, in %.
- p (seeds): two-sided paired t test of the MAEs, paired by seed; Wilcoxon's signed-rank test \
where there are six pairs or more. It asks whether training again would give the same order.
- p (crystals): paired bootstrap of the difference of MAEs: each crystal's absolute errors are \
averaged over the seeds, and crystals are drawn with replacement {resamples:,} times; twice the \
share of draws on the rarer side of zero. It asks whether another test set would give the same \
order, the models as they are.
- p (Holm): corrected for all comparisons of the table.
- p against a published value: two-sided one-sample t test over our seeds against that value, as \
in Table 9 of the CrysLDNet paper.
- mean label and composition ridge: the test MAE of the mean training label, and of a ridge \
regression on element fractions, from the same labels."""
