"""Predicts with a finetuned model, for any input that prepare reads (data sets too).

    python launch/predict.py checkpoint=RUN2 input=new.csv output=predictions.csv
    python launch/predict.py checkpoint=RUN2 input=cifs/ output=predictions.csv device=cuda

Writes `id,prediction`, one line a crystal in the order of the input; crystals that cannot be used
are listed with their reason beside it, in predictions.dropped.csv. What was asked for is kept in
predictions.request.json: the same command finds that its work is done.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.crystals.limits import Limits
from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS
from crysforge.datapipe.preparing.config import origin, sha256
from crysforge.datapipe.preparing.request import HOW, request_of
from crysforge.datapipe.sources import read_crystals
from crysforge.trainer.base.command_line import parse, required, run
from crysforge.trainer.jobs import finetuning as reports
from crysforge.trainer.runs.model_directory import open_model
from crysforge.trainer.serving.ensemble import ENSEMBLE
from crysforge.trainer.serving.load import load
from crysforge.trainer.serving.request import predicted_before


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


def request(config: PredictConfig) -> str:
    """Identifies the predictions that are asked for, by settings, model and input."""
    root = Path(config.checkpoint)
    ensemble = (root / ENSEMBLE).is_file()
    members = sorted(p for p in root.iterdir() if p.is_dir()) if ensemble else [root]
    weights = [sha256(open_model(member).file) for member in members]
    facts = [weights, origin(config.input, config.format)]
    return request_of(config, facts, (*HOW, "checkpoint", "device", "max_atoms"))


def main() -> None:
    config = parse(PredictConfig, __doc__)
    required(config, "checkpoint", "input", "output")
    output = Path(config.output)
    if output.resolve() == Path(config.input).resolve():
        raise ValueError(f"output {output} is the input: choose another output")
    if output.exists() and not config.overwrite:
        done = predicted_before(output, request(config))
        if done is None:
            raise ValueError(f"{output} exists: choose another output, or overwrite=true")
        print(f"{done[0]} predictions are there already: {output}")
        return
    model = load(config.checkpoint, device=config.device, max_pairs=config.max_pairs)
    model.require_head()
    crystals = read_crystals(
        config.input, config.format, limits=config.limits, workers=config.workers, progress=True
    )
    written, dropped = reports.predict_to_csv(
        model, crystals, output, config.max_atoms, request(config)
    )
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
