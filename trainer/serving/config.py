"""Settings of `predict`."""

from __future__ import annotations

from dataclasses import dataclass

from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS
from crysforge.trainer.serving.inputs import PredictReading


@dataclass(kw_only=True)
class PredictConfig(PredictReading):
    """Settings of `predict`: how to read is said as it is to `prepare`."""

    checkpoint: str = ""
    """Finetuning run."""
    output: str = ""
    """CSV to write."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1."""
    max_atoms: int = 4096
    """Atoms per batch."""
    max_pairs: int = MAX_PAIRS
    """Pairs of atoms, or images of atoms, that are looked at for the graph of one crystal."""
    strict: bool = False
    """Whether crystals unlike those that the model learned from (elements, number of atoms, volume
    per atom) are left out; otherwise they are told of."""
    overwrite: bool = False
    """Whether an output file that is there may be replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_atoms", "max_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
