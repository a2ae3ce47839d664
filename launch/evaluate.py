"""Evaluates a suite of runs: tables with statistics, published numbers beside, figures, a report.

    python launch/evaluate.py suite=DIR
    … suite=SWEEP_OUTPUT baseline=init_from=none   a sweep that submit.py ran, or any runs
    … columns=task rows=[pretraining]              a table laid out in another way
    … paper=crysldnet-unified                      published tables beside
    python launch/evaluate.py paper=crysldnet      every table and figure of a paper: the command,
                                                   what is there and what is not, ours beside

Writes DIR/report: report.md, tables (Markdown, CSV, LaTeX) and figures (PNG, SVG). Runs that have
not finished are listed and marked; evaluate again when they have. See docs/evaluation.md.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.launch.cluster.status import run_directories
from crysforge.launch.cluster.submission import SUFFIX, Submission
from crysforge.launch.cluster.suite import prepared
from crysforge.trainer.base.command_line import find_config, parse, required, run
from crysforge.trainer.evaluation.compare import arms_of
from crysforge.trainer.evaluation.exhibits import Exhibit, exhibits
from crysforge.trainer.evaluation.published import published
from crysforge.trainer.evaluation.results import gather
from crysforge.trainer.evaluation.suite import SUITE, Cell, Suite
from crysforge.trainer.reports.config import EvaluateConfig
from crysforge.trainer.reports.formats import Table
from crysforge.trainer.reports.published_tables import published_table
from crysforge.trainer.reports.report import evaluate


def find(path: Path) -> Suite:
    """The suite in a directory, else what was submitted for it, else the runs in it."""
    if (path / SUITE).is_file():
        return Suite.read(path)
    submission = Submission.find(path)
    if submission is not None:
        cells = [
            Cell(name, submission.output(name), cell.get("job", submission.job), cell["values"])
            for name, cell in submission.cells.items()
        ]
        return Suite.of_values(path.with_name(path.name.removesuffix(SUFFIX)), cells)
    if path.is_dir() and (runs := run_directories(path)):
        return Suite.of_runs(path, runs)
    raise ValueError(
        f"{path} is no suite: it has neither {SUITE} nor runs, and no sweep was submitted for it"
    )


def overview(config: EvaluateConfig) -> str:
    """Every table and figure of a paper: the command that makes it, what is there and what is
    missing, published numbers with ours beside.

    Raises:
        ValueError: an unknown paper.
    """
    parts = []
    for shown in exhibits(config.paper):
        parts.append(f"## {shown.exhibit}: {shown.what}")
        parts.append("\n".join(f"    {command}" for command in shown.commands(config.runs)))
        parts += ["\n".join(_state(shown, config))] if shown.suite else []
        parts += [f"To know: {shown.lacks}."] if shown.lacks else []
        parts += [table.markdown() for table in _beside(shown, config)]
    return "\n\n".join(filter(None, parts))


def _state(shown: Exhibit, config: EvaluateConfig) -> list[str]:
    """Data sets and runs of an exhibit's suite."""
    here = prepared(str(find_config(f"suites/{shown.suite}")), config.data_dir or "data")
    absent = [name for name, there in here.items() if not there]
    lines = [f"Data sets: {len(here) - len(absent)} of {len(here)} are here"]
    lines[0] += f"; missing: {', '.join(absent)}." if absent else "."
    root = Path(config.runs) / shown.suite
    if not (root / SUITE).is_file():
        return [*lines, f"Runs: none in {root}."]
    suite = Suite.read(root)
    _, missing = gather(suite, config.split)
    names = {m.cell.name for m in missing}
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


def main() -> None:
    config = parse(EvaluateConfig, __doc__)
    if config.paper and not config.suite:
        print(overview(config))
        return
    required(config, "suite")
    report = evaluate(find(Path(config.suite)), config)
    print(report.main.title, report.main.markdown(), sep="\n\n")
    if report.missing:
        print(f"\n{report.missing} finetuning(s) without results: see the end of the report")
    print(f"\nreport: {report.path / 'report.md'}")


if __name__ == "__main__":
    run(main)
