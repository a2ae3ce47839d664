"""Writes finished finetunings in the format of a public leaderboard, ready to be handed in.

    python launch/leaderboard.py to=jarvis runs=[RUN,RUN] output=DIR metadata.model_name=… \\
        metadata.team_name=… metadata.project_url=… metadata.author_email=…
    python launch/leaderboard.py to=matbench runs=[FOLD0,…,FOLD4] output=DIR metadata.authors=… \\
        metadata.algorithm=… metadata.algorithm_long=…
    … suite=DIR 'where={task: phonons, pretraining: CrysLDNet}'   the runs of a suite

JARVIS: one run for each property, trained on its published split. Matbench: the five official
folds of each task (prepare … split=matbench, finetune … fold=0 to 4; see
configs/suites/matbench.yaml).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.common.places import inside
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run
from crysforge.trainer.evaluation.suite import SUITE, read_suite
from crysforge.trainer.serving.leaderboards import jarvis, matbench

BOARDS = ("jarvis", "matbench")


@dataclass(kw_only=True)
class LeaderboardConfig:
    """Settings of `leaderboard`."""

    to: str = ""
    """`jarvis` or `matbench`."""
    runs: list[str] = field(default_factory=list)
    """Finished finetunings."""
    suite: str = ""
    """Instead of runs: a suite's output."""
    where: dict[str, Any] = field(default_factory=dict)
    """Values of factors that the suite's runs must have."""
    output: str = ""
    """Directory to write; it must not exist, unless this command has made it."""
    dataset: str = "dft_3d"
    """JARVIS's name of the data set."""
    version: str = "8-18-2021"
    """JARVIS's release of it."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the leaderboard wants to know of you and the model."""


def main() -> None:
    config = parse(LeaderboardConfig, __doc__)
    required(config, "to", "output")
    if config.to not in BOARDS:
        raise ValueError(f"unknown leaderboard to={config.to!r}: {nearest(config.to, BOARDS)}")
    if bool(config.runs) == bool(config.suite):
        raise ValueError("give runs=[RUN,…] or suite=DIR")
    runs = config.runs or runs_of(Path(config.suite), config.where)
    if config.to == "jarvis":
        for name in jarvis(runs, config.output, config.metadata, config.dataset, config.version):
            print(name)
    else:
        for task, mae in matbench(runs, config.output, config.metadata).items():
            print(f"{task}: MAE {mae:.4g}, mean of five folds")
    print(f"written to {config.output}")


def runs_of(suite: Path, where: dict[str, Any]) -> list[str]:
    """Runs of the finetunings of a suite that have these values.

    Raises:
        ValueError: no suite, an unknown factor, or no such run.
    """
    record = read_suite(suite / SUITE)
    for factor in where:
        if factor not in record["factors"]:
            raise ValueError(f"unknown factor {factor!r}: {nearest(factor, record['factors'])}")
    found = [
        str(inside(suite, found["path"]))
        for found in record["runs"].values()
        if found["job"] == "finetune"
        and all(str(found["values"].get(k)) == str(v) for k, v in where.items())
    ]
    if not found:
        raise ValueError(f"{suite} has no finetuning with {where}")
    return found


if __name__ == "__main__":
    run(main)
