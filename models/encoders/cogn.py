"""CoGN: messages of deep edge networks, added up and added to the atoms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, NearestConfig, check_positive
from crysforge.models.layers.basic import RBF, EdgeLinear, OneHotLinear
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.segments import segment_sum


@dataclass(kw_only=True)
class CoGNConfig(NearestConfig):
    """Settings of CoGN; the defaults are the published ones."""

    width: int = 128
    """Channels of nodes and edges."""
    layers: int = 5
    edge_layers: int = 5
    """Layers of each edge network."""
    rbf_bins: int = 32
    """Gaussians on the distance from 0 to 8 Å, none at 0."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    neighbors: int = 24
    """Nearest neighbours of the graph."""

    def __post_init__(self) -> None:
        names = ("width", "layers", "edge_layers", "node_inputs", "neighbors")
        check_positive(self, "cogn", *names)
        if self.rbf_bins < 2:
            raise ValueError(f"cogn rbf_bins must be at least 2, got {self.rbf_bins}")


@ENCODERS.register("cogn")
class CoGN(Encoder):
    """CoGN (Ruff et al., Digital Discovery 3, 594, 2024) without its readout; 678,784 parameters by
    default.

    The published network concatenates an embedding of the element with five of its properties and
    takes both through one linear layer: a linear function of the one-hot element, as here. It was
    made for asymmetric units, whose atoms stand for equal ones; here the quotient graph does that,
    by what the network can tell apart. The published graph has an edge from each of an atom's 24
    nearest neighbours, ties kept; here neighbours are mutual. Invariant to rotation, reflection,
    translation and the choice of unit cell.
    """

    Config = CoGNConfig
    tiny: ClassVar = {"width": 16, "layers": 2, "edge_layers": 2, "rbf_bins": 16, "neighbors": 6}

    def __init__(self, config: CoGNConfig) -> None:
        super().__init__()
        self.dim = width = config.width
        self.graph = GraphSpec(
            neighbors=config.neighbors, depth=config.layers, **config.near_rules()
        )
        self.embed_node = OneHotLinear(config.node_inputs, width)
        spacing = 8.0 / config.rbf_bins
        # Their variance is the spacing, not its square.
        self.embed_edge = nn.Sequential(
            RBF(spacing, 8.0, config.rbf_bins, gamma=0.5 / spacing),
            nn.Linear(config.rbf_bins, width),
        )
        self.convs = nn.ModuleList(
            CoGNConv(width, config.edge_layers) for _ in range(config.layers)
        )

    def nodes(self, batch: CrystalBatch) -> Tensor:
        edges = Edges.of(batch)
        x = self.embed_node(batch.node_numbers)
        features = self.embed_edge(batch.distances)
        for conv in self.convs:
            x = conv(x, features, edges)
        return x


class CoGNConv(nn.Module):
    """One CoGN block; 131,840 parameters at width 128 and 5 edge layers."""

    def __init__(self, dim: int, edge_layers: int) -> None:
        super().__init__()
        self.edge = EdgeLinear(dim, dim, dim)
        self.hidden = nn.ModuleList(nn.Linear(dim, dim) for _ in range(edge_layers - 1))
        self.node = nn.Linear(dim, dim)

    def forward(self, x: Tensor, features: Tensor, edges: Edges) -> Tensor:
        """New node features [N, D] from x [N, D] and edge feature rows [R, D]."""
        messages = F.silu(self.edge(x, features, edges))
        for layer in self.hidden:
            messages = F.silu(layer(messages))
        return x + F.silu(self.node(segment_sum(messages, edges)))
