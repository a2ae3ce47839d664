"""CrysGNN: reconstruction of atoms and connectivity, with the symmetry of whole crystals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crysforge.datapipe.graphs.edge_transforms import CountPairEdges
from crysforge.datapipe.graphs.transforms import Chain, SpaceGroup, Transform
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.base import Encoder
from crysforge.models.layers.basic import WideLinear
from crysforge.models.objectives.connectivity import ConnectivityDecoder
from crysforge.models.objectives.contrastive import nt_xent
from crysforge.models.ops.segments import mean_readout
from crysforge.trainer.stages.base import STAGES, PretrainingConfig, Stage, Term

SPACE_GROUPS = 230
LAST_OF_SYSTEM = (2, 15, 74, 142, 167, 194)
"""Last space group of each crystal system but the cubic one."""


@dataclass(kw_only=True)
class CrysGNNConfig(PretrainingConfig):
    """Settings of CrysGNN; the defaults are the released code's, with the schedule of the unified
    comparison (the code's learning rate is 0.03)."""

    temperature: float = 0.07
    """Of the contrast between crystal systems."""
    adjacency_weight: float = 0.25
    """Weight of the number of edges between pairs of atoms."""
    feature_weight: float = 0.25
    """Weight of the elements' features."""
    contrast_weight: float = 0.25
    """Weight of the contrast between crystal systems."""
    space_group_weight: float = 0.25
    """Weight of the space group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "temperature",
            "adjacency_weight",
            "feature_weight",
            "contrast_weight",
            "space_group_weight",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@STAGES.register("crysgnn")
class CrysGNNStage(Stage):
    """Crystal → encoder → edges between pairs of atoms, elements' features, space group; and
    embeddings that lie close together within a crystal system.

    Terms: `adjacency` (weighted cross entropy over 0, 1, …, 5 or more edges, over all pairs),
    `features` (binary cross entropy), `contrast` (NT-Xent over the global batch; under gradient
    accumulation, over each part of it), `space_group` (cross entropy), `adjacency_accuracy`,
    `space_group_accuracy`.
    """

    Config = CrysGNNConfig
    name = "crysgnn"

    last_of_system: Tensor

    def __init__(self, config: CrysGNNConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = ConnectivityDecoder(encoder.dim)
        self.space_group = WideLinear(encoder.dim, SPACE_GROUPS)
        self.register_buffer("last_of_system", torch.tensor(LAST_OF_SYSTEM), persistent=False)
        self.weights = {
            "adjacency": config.adjacency_weight,
            "features": config.feature_weight,
            "contrast": config.contrast_weight,
            "space_group": config.space_group_weight,
        }

    def transform(self) -> Transform:
        return Chain((CountPairEdges(), SpaceGroup()))

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        nodes = self.encoder.nodes(batch)
        found = self.decoder(nodes[batch.node_of_atom], batch)
        pooled = mean_readout(nodes, batch)
        number = batch.extras["space_group"]
        logits = self.space_group(pooled)
        space_group = F.cross_entropy(logits, number - 1, reduction="sum")
        correct = (logits.argmax(dim=1) == number - 1).float().sum()
        shown = 0 if batch.is_dummy else batch.num_crystals  # others must not see a dummy batch
        system = torch.bucketize(number, self.last_of_system)
        contrast = nt_xent(pooled[:shown], system[:shown], self.config.temperature)

        def count(n: int) -> Tensor:
            return correct.new_full((), n)

        return {
            "adjacency": Term(found.pair_loss.sum(), found.pair_weight.sum()),
            "features": Term(found.feature_loss.sum(), count(batch.num_atoms)),
            "contrast": Term(*contrast),
            "space_group": Term(space_group, count(batch.num_crystals)),
            "adjacency_accuracy": Term(found.pair_correct.sum(), count(len(found.pair_correct))),
            "space_group_accuracy": Term(correct, count(batch.num_crystals)),
        }
