"""CrysXPP: an autoencoder of the crystal graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crysforge.datapipe.graphs.edge_transforms import CountPairEdges
from crysforge.datapipe.graphs.transforms import Transform
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.base import Encoder
from crysforge.models.objectives.connectivity import ConnectivityDecoder
from crysforge.trainer.stages.base import STAGES, PretrainingConfig, Stage, Term


@dataclass(kw_only=True)
class CrysXPPConfig(PretrainingConfig):
    """Settings of CrysXPP; the defaults are the released code's, with the schedule of the unified
    comparison."""

    adjacency_weight: float = 0.9
    """Weight of the number of edges between pairs of atoms."""
    feature_weight: float = 0.1
    """Weight of the elements' features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("adjacency_weight", "feature_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@STAGES.register("crysxpp")
class CrysXPPStage(Stage):
    """Crystal → encoder → how many edges of its graph join each pair of atoms, and the 92 features
    of each element. Every crystal counts the same.

    Terms: `adjacency` (weighted cross entropy over 0, 1, …, 5 or more edges), `features` (binary
    cross entropy), `adjacency_accuracy` (over all pairs).
    """

    Config = CrysXPPConfig
    name = "crysxpp"

    def __init__(self, config: CrysXPPConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = ConnectivityDecoder(encoder.dim)
        self.weights = {"adjacency": config.adjacency_weight, "features": config.feature_weight}

    def transform(self) -> Transform:
        return CountPairEdges()

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        found = self.decoder(self.encoder(batch), batch)
        adjacency = _sums(found.pair_loss, found.ptr) / _sums(found.pair_weight, found.ptr)
        features = _sums(found.feature_loss, batch.ptr) / batch.ptr.diff()
        crystals = adjacency.new_full((), batch.num_crystals)
        return {
            "adjacency": Term(adjacency.sum(), crystals),
            "features": Term(features.sum(), crystals),
            "adjacency_accuracy": Term(
                found.pair_correct.sum(), crystals.new_full((), len(found.pair_correct))
            ),
        }


def _sums(values: Tensor, ptr: Tensor) -> Tensor:
    """Sum of the values [n] of each crystal, [B]."""
    return torch.segment_reduce(values, "sum", offsets=ptr)
