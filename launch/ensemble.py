"""Makes several finetunings one model that says how far its predictions can be trusted.

    python launch/ensemble.py runs=[RUN2,RUN3,RUN4] output=DIR
    python launch/predict.py checkpoint=DIR input=new.csv output=predictions.csv

The runs predict the same targets and were judged on the same crystals; they differ in their seeds,
say, or in their encoders. DIR holds copies of them and can be moved or given away.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run


@dataclass(kw_only=True)
class EnsembleConfig:
    """Settings of `ensemble`."""

    runs: list[str] = field(default_factory=list)
    """Finished finetunings."""
    output: str = ""
    """Directory to write; it must not exist, unless this command has made it."""


def main() -> None:
    config = parse(EnsembleConfig, __doc__)
    required(config, "runs", "output")
    from crysforge.trainer.jobs.finetuning import scores_of
    from crysforge.trainer.serving.ensemble import create

    metrics = create(config.runs, config.output)
    split = "test" if "test" in metrics else "val"
    for name in metrics["targets"]:
        found = scores_of(metrics, split, name)
        unit, alone = metrics["units"][name], found["members_mae"]
        print(
            f"{split} MAE of {name}: {found['mae']:.4g} {unit}; members alone "
            f"{min(alone):.4g} to {max(alone):.4g}"
        )
        fit = found["calibration"]
        print(
            f"  uncertainty: miscalibration area {fit['area']:.3f}, rank correlation with the "
            f"error {fit['rank_correlation']:.2f}"
        )
    print(f"ensemble: {config.output}")


if __name__ == "__main__":
    run(main)
