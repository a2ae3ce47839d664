"""Makes a directory of a run's model to give to others: weights, config, scaler and a model card.

    python launch/export.py checkpoint=RUN output=DIR license=cc-by-4.0
    … stage=vae               another stage than a pretraining run's last
    … tag=joint-00010000      the weights of a checkpoint, of an unfinished run too; tag=newest

DIR is all that `launch/predict.py checkpoint=DIR`, `launch/finetune.py init_from=DIR` and
`crysforge.load(DIR)` need.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run


@dataclass(kw_only=True)
class ExportConfig:
    """Settings of `export`."""

    checkpoint: str = ""
    """Run, or model directory."""
    output: str = ""
    """Directory to write; it must not exist, unless this command has made it."""
    stage: str = ""
    """Stage of a pretraining run; default its last finished one."""
    tag: str = ""
    """Checkpoint of the run to take the weights from, or `newest`; default: a finished stage."""
    license: str = ""
    """Licence that the model is given away under, best an SPDX identifier."""


def main() -> None:
    config = parse(ExportConfig, __doc__)
    required(config, "checkpoint", "output")
    if config.tag and config.stage:
        raise ValueError("give stage=NAME or tag=CHECKPOINT, not both")
    from crysforge.trainer.runs.card import share
    from crysforge.trainer.runs.model_directory import open_checkpoint, open_model

    if config.tag:
        tag = "" if config.tag == "newest" else config.tag
        exported, weights, tag = open_checkpoint(config.checkpoint, tag)
    else:
        exported, weights, tag = open_model(config.checkpoint, config.stage), None, ""
    output = share(exported, config.output, weights=weights, checkpoint=tag, license=config.license)
    print(f"{exported.stage} model of {config.checkpoint}: {output}")
    print(f"model card: {output / 'README.md'}")


if __name__ == "__main__":
    run(main)
