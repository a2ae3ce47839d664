"""The report of a suite: statistics, tables and figures in one folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from crysforge.datapipe.common.escape import markdown
from crysforge.datapipe.common.files import replacing_directory, write_text
from crysforge.datapipe.common.places import inside
from crysforge.datapipe.common.safe_names import slugs
from crysforge.trainer.base.tensors import code_version
from crysforge.trainer.evaluation.compare import (
    Arm,
    arms_of,
    compare,
    lines_of,
    most_labels,
    title_of,
    varying,
)
from crysforge.trainer.evaluation.published import Published, published
from crysforge.trainer.evaluation.results import gather
from crysforge.trainer.evaluation.suite import Suite
from crysforge.trainer.reports import crystal_figures, figures
from crysforge.trainer.reports.bars import bars
from crysforge.trainer.reports.config import EvaluateConfig
from crysforge.trainer.reports.costs import costs_table
from crysforge.trainer.reports.crystals import Facts, atoms_table, facts_behind, facts_of
from crysforge.trainer.reports.formats import Table
from crysforge.trainer.reports.published_tables import published_table
from crysforge.trainer.reports.scores_tables import missing_table, scores_table
from crysforge.trainer.reports.tables import comparisons_table, results_table
from crysforge.trainer.runs.logger import read_metrics

REPORT = "report.md"
_LABELS = ("label_fraction", "label_count")


@dataclass
class Report:
    """A written report."""

    path: Path
    main: Table
    missing: int
    """Runs without results."""


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
    output = Path(config.output) if config.output else inside(suite.root, "report")
    if output.exists() and not _is_report(output):
        raise ValueError(f"{output} is there and is no report: give another output=DIR")
    if config.baseline:
        suite.compare_with(config.baseline)
    known = published().select(config.paper or suite.paper)
    results, missing = gather(suite, config.split)
    if not results:
        why = f"{missing[0].run.name}: {missing[0].reason}" if missing else "it has no finetunings"
        raise ValueError(f"nothing to evaluate in {suite.root}: {why}")
    arms = arms_of(suite, results, missing)
    comparisons = compare(suite, arms, config.resamples, config.confidence)
    main = results_table(suite, arms, comparisons, known, config.split, config.rows, config.columns)
    tables = [main]
    if comparisons:
        tables.append(comparisons_table(suite, arms, comparisons, config.confidence))
    tables.append(scores_table(suite, arms, known, config.split, config.confidence))
    facts, notes = facts_of(
        results, config.data, config.data_dir, config.split, config.space_groups
    )
    by_atoms = atoms_table(suite, arms, facts)
    tables += [by_atoms] if by_atoms.rows else []
    tables += [published_table(suite, arms, known, t) for t in known.tables]
    costs = costs_table(suite, known.costs)
    tables += [costs] if costs else []
    tables += [missing_table(missing)] if missing else []

    without = {m.run.name for m in missing}
    with replacing_directory(output) as work:
        (work / "tables").mkdir()
        for table in tables:
            table.write(work / "tables")
        drawn: list[Figure] = []
        if config.figures:
            (work / "figures").mkdir()
            drawn = _draw(suite, arms, facts, config, work / "figures")
            drawn += _stage2(suite, work / "figures")
        text = _text(suite, tables, drawn, notes, known, config, len(suite.evaluated), len(without))
        write_text(work / REPORT, text)
    return Report(output, main, len(without))


def _is_report(path: Path) -> bool:
    """Whether a directory holds a report, and nothing else that would be lost."""
    if not (path / REPORT).is_file():
        return False
    return {p.name for p in path.iterdir()} <= {REPORT, "tables", "figures"}


def _draw(
    suite: Suite, arms: Sequence[Arm], facts: dict[str, Facts], config: EvaluateConfig, folder: Path
) -> list[Figure]:
    """All figures of a report."""
    look = figures.ArmStyle(suite, arms)
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
            bars(some, look, name, config.confidence, title)
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


def _stage2(suite: Suite, folder: Path) -> list[Figure]:
    """The flow losses of all runs of stage 2 in one figure (Figure 5 of the CrysLDNet paper); none
    where fewer than two have a log."""
    curves = {}
    for run in suite.runs:
        if run.job == "pretrain":
            with suppress(OSError, ValueError):
                curves[run.name] = read_metrics(run.path, "joint").get("train/flow", [])
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if len(curves) < 2:
        return []
    figures.stage_curves(curves, "flow loss", folder / "stage2")
    return [Figure("stage2", "Flow loss of stage 2", "stage2", "")]


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
        f"# {markdown(suite.title)}",
        f"{planned - missing} of {planned} finetunings have finished.",
    ]
    if missing:
        parts[-1] += " Those that have not are listed at the end and marked in the tables."
    parts += [f"Note: {markdown(note)}." for note in notes]
    for table in tables:
        files = ", ".join(f"[{x}](tables/{table.name}.{x})" for x in ("md", "csv", "tex"))
        title = markdown(table.title.removeprefix(f"{suite.title}: "))
        parts += [f"## {title[0].upper()}{title[1:]}", table.markdown(), f"Files: {files}"]
    if known.improvements:
        parts.append("## Published mean gains over no pretraining")
        parts.append("\n".join(
            f"- {x['source']}, {x['what']}: {x['percent']:g} %"
            for x in known.improvements
        ))  # fmt: skip
    if drawn:
        parts.append("## Figures")
        for figure in drawn:
            file, title = f"figures/{figure.name}", markdown(figure.title)
            parts.append(f"### {title}\n\n![{title}]({file}.png)\n\n[SVG]({file}.svg)")
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
