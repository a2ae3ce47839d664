"""What CrysXPP and CrysGNN reconstruct: how many edges join each pair of atoms, and the elements'
features.

Letters in shapes: A atoms, B crystals, P pairs (models/objectives/pairs.py), D channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.layers.basic import WideLinear
from crysforge.models.objectives.element_features import NUM_FEATURES, element_features
from crysforge.models.objectives.pairs import PairClassifier
from crysforge.models.ops.pairs import Pairs

MOST_EDGES = 5
"""Classes are 0, 1, … edges; more than this count as this."""

UNJOINED_WEIGHT = 0.1
"""Weight of a pair without an edge, against 1 of the others: most pairs have none."""


class Reconstruction(NamedTuple):
    """Losses of a batch, fp32. A tuple, because ZeRO-3 must find the tensors in it."""

    pair_loss: Tensor
    """[P] cross entropy of the number of edges times the pair's weight."""
    pair_weight: Tensor
    """[P]."""
    pair_correct: Tensor
    """[P] 1 where the number of edges is the likeliest."""
    feature_loss: Tensor
    """[A] binary cross entropy, mean over the 92 features."""
    ptr: Tensor
    """[B+1] first pair of each crystal, then P."""


class ConnectivityDecoder(nn.Module):
    """Edges between pairs and features of elements, from the atoms' latents."""

    table: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pairs = PairClassifier(dim, MOST_EDGES + 1)
        self.features = WideLinear(dim, NUM_FEATURES)
        self.register_buffer("table", element_features().clone(), persistent=False)

    def forward(self, atoms: Tensor, batch: CrystalBatch) -> Reconstruction:
        """Losses of the latents [A, D]; the batch carries `pair_edges` (graphs/transforms.py)."""
        log_p = self.pairs(atoms, batch.ptr, batch.atoms_per_crystal or None)
        edges = batch.extras["pair_edges"].long().clamp(max=MOST_EDGES)
        weight = torch.where(edges == 0, UNJOINED_WEIGHT, 1.0)
        features = F.binary_cross_entropy_with_logits(
            self.features(atoms), self.table[batch.numbers], reduction="none"
        )
        return Reconstruction(
            pair_loss=-log_p.gather(1, edges[:, None])[:, 0] * weight,
            pair_weight=weight,
            pair_correct=(log_p.argmax(dim=1) == edges).float(),
            feature_loss=features.mean(dim=1),
            ptr=Pairs.starts(batch.ptr),
        )
