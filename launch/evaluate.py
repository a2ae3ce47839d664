"""Evaluates a suite of runs: tables with statistics, published numbers beside, figures, a report;
or generated crystals: how near they are to what exists, how valid, how new.

    python launch/evaluate.py suite=DIR
    … suite=SWEEP_OUTPUT baseline=init_from=none   a sweep that submit.py ran, or any runs
    … columns=task rows=[pretraining]              a table laid out in another way
    … paper=crysldnet-unified                      published tables beside
    python launch/evaluate.py paper=crysldnet      every table and figure of a paper: the command,
                                                   what is there and what is not, ours beside
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

from crysforge.launch.cluster.planning.suite import prepared
from crysforge.launch.cluster.status import run_directories
from crysforge.launch.cluster.submission import SUFFIX, Submission
from crysforge.trainer.base.command_line import find_config, parse, required
from crysforge.trainer.base.script import run
from crysforge.trainer.evaluation.suite import SUITE, Suite, SuiteRun
from crysforge.trainer.judging.config import JudgeConfig


def find(path: Path) -> Suite:
    """The suite in a directory, else what was submitted for it, else the runs in it."""
    if (path / SUITE).is_file():
        return Suite.read(path)
    submission = Submission.find(path)
    if submission is not None:
        submitted = [
            SuiteRun(
                name, submission.output(name), planned.get("job", submission.job), planned["values"]
            )
            for name, planned in submission.runs.items()
        ]
        return Suite.of_values(path.with_name(path.name.removesuffix(SUFFIX)), submitted)
    if path.is_dir() and (runs := run_directories(path)):
        return Suite.of_runs(path, runs)
    raise ValueError(
        f"{path} is no suite: it has neither {SUITE} nor runs, and no sweep was submitted for it"
    )


def main() -> None:
    config = parse(JudgeConfig, __doc__)
    if config.csp or config.generation:
        from crysforge.trainer.judging.report import judge_generation, judge_prediction

        table = judge_prediction(config) if config.csp else judge_generation(config)
        print(table.title, table.markdown(), sep="\n\n")
        return
    if config.paper and not config.suite:
        from crysforge.trainer.reports.published_tables import overview

        def data_sets(suite: str) -> dict[str, bool]:
            return prepared(str(find_config(f"suites/{suite}")), config.data_dir or "data")

        print(overview(config, data_sets))
        return
    required(config, "suite")
    from crysforge.trainer.reports.report import evaluate

    report = evaluate(find(Path(config.suite)), config)
    print(report.main.title, report.main.markdown(), sep="\n\n")
    if report.missing:
        print(f"\n{report.missing} finetuning(s) without results: see the end of the report")
    print(f"\nreport: {report.path / 'report.md'}")


if __name__ == "__main__":
    run(main)
