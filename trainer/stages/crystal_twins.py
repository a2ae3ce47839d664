"""Crystal Twins: two distorted views of a crystal shall have the same embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.graphs.edge_transforms import DropEdges
from crysforge.datapipe.graphs.transforms import (
    Chain,
    ShiftAtoms,
    Step,
    Transform,
    TwoViews,
)
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.base import Encoder
from crysforge.models.objectives.contrastive import (
    PredictionHead,
    Projector,
    barlow_twins,
    negative_cosine,
)
from crysforge.models.ops.segments import mean_readout
from crysforge.trainer.stages.base import STAGES, Stage, Term
from crysforge.trainer.stages.vae import MaskingConfig

VARIANTS = ("barlow", "simsiam")
SPREAD_WARNING = 0.05
"""Spread of the embeddings below which they are taken for collapsed."""


@dataclass(kw_only=True)
class CrystalTwinsConfig(MaskingConfig):
    """Settings of Crystal Twins; the defaults are the paper's, with the schedule of the unified
    comparison. Barlow needs batches as large as the encoder is wide."""

    variant: str = "barlow"
    """`barlow`: channels of the two views correlate one to one; `simsiam`: each view predicts the
    other."""
    off_diagonal: float = 0.0051
    """Barlow's weight of the correlation between different channels."""
    shift: float = 0.05
    """Longest random displacement of an atom, in Å."""
    mask_ratio: float = 0.1
    """Share of the atoms whose element is hidden, rounded down to at least one; 0 hides none."""
    edge_ratio: float = 0.1
    """Share of the edges that are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}: {nearest(self.variant, VARIANTS)}")
        if not 0 <= self.edge_ratio < 1:
            raise ValueError(f"edge_ratio must be in [0, 1), got {self.edge_ratio}")
        for name in ("off_diagonal", "shift"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@STAGES.register("crystal_twins")
class CrystalTwinsStage(Stage):
    """Crystal → two views (atoms shifted, some hidden, some edges left out) → encoder → projector →
    agreement. The views of a crystal are neighbours in the batch, so batch norms of the encoder see
    both.

    Terms: `barlow` (over the global batch; under gradient accumulation, over each part of it); or
    `simsiam` (from −1, views agree, to 1) with `spread` (variance of the embeddings' directions on
    a rank: 0 collapsed, 1 in all directions), since its loss alone does not show a collapse.
    """

    Config = CrystalTwinsConfig
    name = "crystal_twins"

    def __init__(self, config: CrystalTwinsConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        simsiam = config.variant == "simsiam"
        self.projector = Projector(encoder.dim, norm=simsiam)
        self.predictor = PredictionHead(encoder.dim) if simsiam else None
        self.weights = {config.variant: 1.0}

    def transform(self) -> Transform:
        steps: list[Step] = [ShiftAtoms(self.config.shift)]
        if mask := self.config.mask(round_up=False):
            steps.append(mask)
        steps.append(DropEdges(self.config.edge_ratio))
        return TwoViews(Chain(tuple(steps)))

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        pooled = mean_readout(self.encoder.nodes(batch), batch)
        shown = 0 if batch.is_dummy else len(pooled)  # others must not see a dummy batch
        z = self.projector(pooled[:shown])
        if self.predictor is None:
            return {"barlow": Term(*barlow_twins(z[0::2], z[1::2], self.config.off_diagonal))}
        return {"simsiam": _simsiam(self.predictor(z), z), "spread": _spread(z.detach())}

    def warnings(self, means: Mapping[str, float]) -> list[str]:
        if means.get("spread", 1.0) > SPREAD_WARNING:
            return []
        return [
            f"the embeddings are collapsing: their spread is {means['spread']:.2g}; lower the "
            "learning rate or raise crystal_twins.mask_ratio and edge_ratio"
        ]


def _simsiam(prediction: Tensor, z: Tensor) -> Term:
    """Mean of both directions, for each crystal; views of a crystal are neighbours in [2B, D]."""
    there = negative_cosine(prediction[0::2], z[1::2])
    back = negative_cosine(prediction[1::2], z[0::2])
    return Term((there + back).sum() / 2, there.new_full((), len(there)))


def _spread(z: Tensor) -> Term:
    """1 minus the squared length of the mean of the normalised embeddings, of this rank's batch."""
    some = float(len(z) > 0)
    mean = F.normalize(z.float(), dim=1).sum(dim=0) / max(len(z), 1)
    return Term((1 - mean.square().sum()) * some, mean.new_full((), some))
