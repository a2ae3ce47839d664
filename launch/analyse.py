"""Analyses the latents of a trained encoder.

    python launch/analyse.py checkpoint=RUN data=DIR output=DIR2
    … stage=vae                                    the encoder of the first pretraining stage
    … analyses=[probes,smoothness] count=500       some of: probes, information, smoothness,
                                                   variance, invariance, collapse, map

Writes analysis.json, analysis.md, figures as PNG and files for TensorBoard's projector.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.trainer.analysis.config import AnalysisConfig
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run


@dataclass(kw_only=True)
class AnalyseConfig(AnalysisConfig):
    """Settings of `analyse`."""

    checkpoint: str = ""
    """Run or exported model."""
    stage: str = ""
    """Stage of a pretraining run; default its last."""
    data: str = ""
    """Prepared data set."""
    output: str = ""
    """Directory to write; it must not exist, unless this command has made it."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1."""


def main() -> None:
    config = parse(AnalyseConfig, __doc__)
    required(config, "checkpoint", "data", "output")
    from crysforge.datapipe.storage.dataset import Dataset
    from crysforge.models import kernels
    from crysforge.trainer.analysis.report import analyse, analysed_before, asked
    from crysforge.trainer.base.distributed import device_of
    from crysforge.trainer.runs.model_directory import open_model

    device = device_of(config.device)
    kernels.enable(device)
    print(threads.describe())
    model, dataset = open_model(config.checkpoint, config.stage), Dataset.open(config.data)
    request = asked(config, model, dataset, config.checkpoint)
    if not analysed_before(config.output, request):
        stage = model.build_stage().to(device)
        analyse(stage, dataset, config, config.output, config.checkpoint, request)
    text = (Path(config.output) / "analysis.md").read_text(encoding="utf-8")
    print(text + f"\nanalysis: {config.output}")


if __name__ == "__main__":
    run(main)
