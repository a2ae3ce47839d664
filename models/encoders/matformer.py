"""Matformer: attention over a periodic graph whose self-edges encode the lattice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, NearestConfig
from crysforge.models.layers.basic import RBF, OneHotLinear
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.messages import matformer_messages
from crysforge.models.ops.norm import BatchNorm


@dataclass(kw_only=True)
class MatformerConfig(NearestConfig):
    """Settings of Matformer; the defaults are the published ones."""

    width: int = 128
    """Channels of nodes, edges and each head."""
    heads: int = 4
    layers: int = 5
    rbf_bins: int = 128
    """Gaussians on the distance from 0 to 8 Å."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    neighbors: int = 12
    """Nearest neighbours of the graph, to which lattice self-edges are added."""
    lattice_edges: bool | None = None
    """Whether they are; None: yes. The released code of DPF pretrains without them."""

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers", "node_inputs", "neighbors"):
            if getattr(self, name) < 1:
                raise ValueError(f"matformer {name} must be at least 1, got {getattr(self, name)}")


@ENCODERS.register("matformer")
class Matformer(Encoder):
    """Matformer (Yan et al., NeurIPS 2022) without its readout; 2,769,664 parameters by default.

    Invariant to rotation, reflection and translation; not to the choice of unit cell, since the
    lattice self-edges follow the given one.
    """

    Config = MatformerConfig
    tiny: ClassVar = {"width": 16, "heads": 2, "layers": 2, "rbf_bins": 32, "neighbors": 6}

    def __init__(self, config: MatformerConfig) -> None:
        super().__init__()
        self.dim = config.width
        self.graph = GraphSpec(
            neighbors=config.neighbors,
            lattice_edges="none" if config.lattice_edges is False else "matformer",
            depth=config.layers,
            **config.near_rules(),
        )
        self.embed_node = OneHotLinear(config.node_inputs, config.width)
        self.embed_edge = nn.Sequential(
            RBF(0.0, 8.0, config.rbf_bins),
            nn.Linear(config.rbf_bins, config.width),
            nn.Softplus(),
            nn.Linear(config.width, config.width),
        )
        self.convs = nn.ModuleList(
            MatformerConv(config.width, config.heads) for _ in range(config.layers)
        )

    def nodes(self, batch: CrystalBatch) -> Tensor:
        edges = Edges.of(batch)
        x = self.embed_node(batch.node_numbers)
        features = self.embed_edge(batch.distances)
        for conv in self.convs:
            x = conv(x, features, edges, batch.node_multiplicity)
        return x


class MatformerConv(nn.Module):
    """One Matformer layer; 544,256 parameters at width 128 and 4 heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, heads * dim) for _ in range(3))
        self.edge = nn.Linear(dim, heads * dim, bias=False)
        self.update = nn.Linear(3 * dim, 3 * dim)
        self.norm_gate = nn.LayerNorm(3 * dim)
        self.message = nn.Linear(3 * dim, dim)
        self.norm_message = nn.LayerNorm(dim)
        self.out = nn.Linear(heads * dim, dim)
        self.skip = nn.Linear(dim, dim)
        self.norm = BatchNorm(dim)

    def forward(
        self, x: Tensor, features: Tensor, edges: Edges, node_multiplicity: Tensor
    ) -> Tensor:
        """New node features [N, D] from x [N, D] and edge feature rows [R, D]."""
        dim = x.shape[1]
        query, key, value, edge = (
            y.view(-1, self.heads, dim)
            for y in (self.query(x), self.key(x), self.value(x), self.edge(features))
        )
        # Blocks of the update's weight on [value_target; value_source; edge].
        target, source, last = self.update.weight.split(dim, 1)
        both = F.linear(value, torch.cat([target, source]))
        rows = F.linear(edge, last, self.update.bias)
        values = torch.cat([both[..., : 3 * dim], both[..., 3 * dim :], rows]).flatten(1)
        messages = matformer_messages(
            query / math.sqrt(3 * dim),
            key,
            edge,
            values,
            self.norm_gate,
            self.message,
            self.norm_message,
            edges,
        )
        return F.silu(self.norm(self.out(messages.flatten(1)), node_multiplicity)) + self.skip(x)
