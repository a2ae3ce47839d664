"""Small networks on top of an encoder's latents."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.ops.segments import mean_readout


class ReadoutHead(nn.Module):
    """Properties of whole crystals: mean over atoms, then two linear layers; 66,049 parameters
    from 256 channels to one property.

    Args:
        hidden: False leaves the last layer alone.
    """

    def __init__(self, dim: int, out: int = 1, hidden: bool = True) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim) if hidden else None
        self.out = nn.Linear(dim, out)

    def forward(self, nodes: Tensor, batch: CrystalBatch) -> Tensor:
        """Latents of the batch's nodes, [N, dim] (`Encoder.nodes`), to [B, out]."""
        return self.of_means(mean_readout(nodes, batch))

    def of_means(self, mean: Tensor) -> Tensor:
        """Means over the atoms of each crystal, [B, dim], to [B, out]."""
        return self.out(mean if self.hidden is None else F.silu(self.hidden(mean)))
