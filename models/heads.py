"""Small networks on top of an encoder's latents."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from datapipe.schema import CrystalBatch
from models.ops import mean_readout


class ReadoutHead(nn.Module):
    """Properties of whole crystals: mean over atoms, then two linear layers; 66,049 parameters
    from 256 channels to one property."""

    def __init__(self, dim: int, out: int = 1) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, out)

    def forward(self, nodes: Tensor, batch: CrystalBatch) -> Tensor:
        """Latents of the batch's nodes, [N, dim] (`Encoder.nodes`), to [B, out]."""
        return self.out(F.silu(self.hidden(mean_readout(nodes, batch))))
