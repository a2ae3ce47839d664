"""Predicts with a finetuned model, for any input that prepare reads (data sets too).

    python launch/predict.py checkpoint=RUN2 input=new.csv output=predictions.csv
    python launch/predict.py checkpoint=RUN2 input=cifs/ output=predictions.csv device=cuda

Writes `id,prediction`, one line a crystal in the order of the input; crystals that cannot be used
are listed with their reason beside it, in predictions.dropped.csv.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.crystals.limits import Limits
from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS
from crysforge.datapipe.sources import read_crystals
from crysforge.trainer.base.command_line import parse, required, run
from crysforge.trainer.jobs import finetuning as reports
from crysforge.trainer.serving.load import load


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
    limits: Limits = field(default_factory=Limits)
    """What one crystal may cost while it is read."""
    max_atoms: int = 4096
    """Atoms per batch."""
    max_pairs: int = MAX_PAIRS
    """Pairs of atoms, or images of atoms, that are looked at for the graph of one crystal."""
    workers: int = 0
    """Processes that parse; 0: one for each core."""
    overwrite: bool = False
    """Whether an output file that is there may be replaced."""

    def __post_init__(self) -> None:
        for name in ("max_atoms", "max_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def main() -> None:
    config = parse(PredictConfig, __doc__)
    required(config, "checkpoint", "input", "output")
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise ValueError(f"{output} exists: choose another output, or overwrite=true")
    if output.resolve() == Path(config.input).resolve():
        raise ValueError(f"output {output} is the input: choose another output")
    model = load(config.checkpoint, device=config.device, max_pairs=config.max_pairs)
    model.require_head()
    crystals = read_crystals(
        config.input, config.format, limits=config.limits, workers=config.workers, progress=True
    )
    written, dropped = reports.predict_to_csv(model, crystals, output, config.max_atoms)
    listed = reports.dropped_path(output)
    if not written:
        raise ValueError(f"no crystal of {config.input} could be used: {listed} says why")
    units = ", ".join(
        f"{n} ({u})" if u else n for n, u in zip(model.targets, model.units, strict=True)
    )
    print(f"{written} predictions of {units}: {output}")
    if dropped:
        print(f"{dropped} crystals could not be used: {listed}")


if __name__ == "__main__":
    run(main)
