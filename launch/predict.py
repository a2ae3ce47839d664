"""Predicts with a finetuned model, for any input that prepare reads (data sets too).

    python launch/predict.py checkpoint=RUN2 input=new.csv output=predictions.csv
    python launch/predict.py checkpoint=RUN2 input=cifs/ output=predictions.csv device=cuda

Writes `id,prediction`, one line a crystal in the order of the input; crystals that cannot be used
are listed with their reason beside it, in predictions.dropped.csv. Into a pipe (output=/dev/stdout)
the lines go as they come, and all else goes to standard error.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.datapipe.common.streams import is_stream
from crysforge.datapipe.sources import read_crystals
from crysforge.trainer.base.command_line import parse, required, run
from crysforge.trainer.serving.load import load
from crysforge.trainer.serving.predict import dropped_path, predict_to_csv


@dataclass(kw_only=True)
class PredictConfig:
    """Settings of `predict`."""

    checkpoint: str = ""
    """Finetuning run."""
    input: str = ""
    """Anything that prepare reads."""
    output: str = ""
    """CSV to write."""
    format: str = "auto"
    """Reader by name; "auto" goes by what the input looks like."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1."""
    max_atoms: int = 4096
    """Atoms per batch."""
    workers: int = 0
    """Processes that parse; 0: one for each core."""
    overwrite: bool = False
    """Whether an output file that is there may be replaced."""

    def __post_init__(self) -> None:
        if self.max_atoms < 1:
            raise ValueError(f"max_atoms must be at least 1, got {self.max_atoms}")


def main() -> None:
    config = parse(PredictConfig, __doc__)
    required(config, "checkpoint", "input", "output")
    output = Path(config.output)
    through = is_stream(output)
    if output.exists() and not config.overwrite and not through:
        raise ValueError(f"{output} exists: choose another output, or overwrite=true")
    if output.resolve() == Path(config.input).resolve():
        raise ValueError(f"output {output} is the input: choose another output")
    print(threads.describe())
    model = load(config.checkpoint, device=config.device)
    model.require_head()
    crystals = read_crystals(config.input, config.format, workers=config.workers, progress=True)
    written, dropped = predict_to_csv(model, crystals, output, config.max_atoms)
    listed = dropped_path(output)
    if not written:
        raise ValueError(f"no crystal of {config.input} could be used: {listed} says why")
    units = ", ".join(
        f"{n} ({u})" if u else n for n, u in zip(model.targets, model.units, strict=True)
    )
    said = sys.stderr if through else sys.stdout
    print(f"{written} predictions of {units}: {output}", file=said)
    if dropped:
        print(f"{dropped} crystals could not be used: {listed}", file=said)


if __name__ == "__main__":
    run(main)
