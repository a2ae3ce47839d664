"""Evaluates a suite of runs: tables with statistics, published numbers beside, figures, a report;
or generated crystals: how near they are to what exists, how valid, how new.

    python launch/evaluate.py suite=DIR
    … suite=SWEEP_OUTPUT baseline=init_from=none   a sweep that submit.py ran, or any runs
    … columns=task rows=[pretraining]              a table laid out in another way
    … paper=crysldnet-unified                      published tables beside
    python launch/evaluate.py csp=DIR reference=DATA           structures predicted for a data set
    python launch/evaluate.py generation=DIR reference=DATA    crystals of a model's own choice

Writes DIR/report: report.md, tables (Markdown, CSV, LaTeX) and figures (PNG, SVG). Runs that have
not finished are listed and marked; evaluate again when they have. See docs/evaluation.md. Of
generated crystals: DIR/evaluation, with tables and a line for every structure (docs/generation.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.launch.cluster.status import run_directories
from crysforge.launch.cluster.submission import SUFFIX, Submission
from crysforge.trainer.base.command_line import parse, required, run
from crysforge.trainer.evaluation.suite import SUITE, Cell, Suite
from crysforge.trainer.judging.config import JudgeConfig
from crysforge.trainer.judging.report import judge_generation, judge_prediction
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


def main() -> None:
    config = parse(JudgeConfig, __doc__)
    if config.csp or config.generation:
        table = judge_prediction(config) if config.csp else judge_generation(config)
        print(table.title, table.markdown(), sep="\n\n")
        return
    required(config, "suite")
    report = evaluate(find(Path(config.suite)), config)
    print(report.main.title, report.main.markdown(), sep="\n\n")
    if report.missing:
        print(f"\n{report.missing} finetuning(s) without results: see the end of the report")
    print(f"\nreport: {report.path / 'report.md'}")


if __name__ == "__main__":
    run(main)
