"""CGCNN: gated convolutions over the nearest neighbours of each atom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, NearestConfig, check_positive
from crysforge.models.layers.basic import RBF, EdgeLinear, OneHotLinear
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.norm import BatchNorm
from crysforge.models.ops.precision import full_precision
from crysforge.models.ops.segments import segment_sum


@dataclass(kw_only=True)
class CGCNNConfig(NearestConfig):
    """Settings of CGCNN; the defaults are the published ones."""

    width: int = 64
    """Channels of nodes."""
    layers: int = 3
    rbf_bins: int = 41
    """Gaussians on the distance from 0 to 8 Å, as wide as their spacing."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    neighbors: int = 12
    """Nearest neighbours of the graph."""

    def __post_init__(self) -> None:
        check_positive(self, "cgcnn", "width", "layers", "node_inputs", "neighbors")


@ENCODERS.register("cgcnn")
class CGCNN(Encoder):
    """CGCNN (Xie and Grossman, Phys. Rev. Lett. 120, 145301, 2018) without its readout; 74,112
    parameters by default.

    The published graph gives each atom exactly 12 neighbours, in list order where distances tie.
    Here ties are kept and neighbours are mutual, so that the graph depends on the crystal alone;
    an atom with a sparse surrounding gets its neighbours from beyond 8 Å. Invariant to rotation,
    reflection, translation and the choice of unit cell.
    """

    Config = CGCNNConfig
    tiny: ClassVar = {"width": 16, "layers": 2, "rbf_bins": 21, "neighbors": 6}

    def __init__(self, config: CGCNNConfig) -> None:
        super().__init__()
        self.dim = config.width
        self.graph = GraphSpec(
            neighbors=config.neighbors,
            depth=config.layers,
            **config.near_rules(),
        )
        self.embed_node = OneHotLinear(config.node_inputs, config.width)
        spacing = 8.0 / max(config.rbf_bins - 1, 1)
        self.rbf = RBF(0.0, 8.0, config.rbf_bins, gamma=spacing**-2)
        self.convs = nn.ModuleList(
            CGCNNConv(config.width, config.rbf_bins) for _ in range(config.layers)
        )

    def nodes(self, batch: CrystalBatch) -> Tensor:
        edges = Edges.of(batch)
        x = self.embed_node(batch.node_numbers)
        features = self.rbf(batch.distances)
        for conv in self.convs:
            x = conv(x, features, edges, batch.node_multiplicity)
        return x


class CGCNNConv(nn.Module):
    """One CGCNN layer; 22,144 parameters at width 64 and 41 features."""

    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.edge = EdgeLinear(dim, features, 2 * dim)
        self.norm_edge = BatchNorm(2 * dim)
        self.norm_out = BatchNorm(dim)

    def forward(
        self, x: Tensor, features: Tensor, edges: Edges, node_multiplicity: Tensor
    ) -> Tensor:
        """New node features [N, D], all positive, from x [N, D] and edge features [R, F]."""
        z = self.norm_edge(full_precision(self.edge(x, features, edges)), edges.weight)
        gate, core = z.chunk(2, dim=1)
        messages = torch.sigmoid(gate) * F.softplus(core)
        return F.softplus(x + self.norm_out(segment_sum(messages, edges), node_multiplicity))
