"""PDDFormer as CrysLDNet trains it: ComFormer attention and pointwise distance distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, NearestConfig
from crysforge.models.layers.basic import RBF, ComformerConv, OneHotLinear
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.keyed_random import keyed_dropout
from crysforge.models.ops.norm import BatchNorm

DROPOUT_SALT = 0x5A454F
"""Salt of the first gating block's dropout; the next blocks count up."""


@dataclass(kw_only=True)
class PDDFormerConfig(NearestConfig):
    """Settings of PDDFormer; the defaults are CrysLDNet's."""

    width: int = 256
    """Channels of nodes and edges."""
    layers: int = 4
    """Attention layers; a gating block sits between each two."""
    rbf_bins: int = 256
    """Gaussians on -0.75/distance."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    pdd: int = 92
    """Distances in a row of the pointwise distance distribution."""
    neighbors: int = 25
    """Nearest neighbours of the graph."""
    dropout: float = 0.1
    """Dropout in the gating blocks."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "node_inputs", "pdd", "neighbors"):
            if getattr(self, name) < 1:
                raise ValueError(f"pddformer {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"pddformer dropout must be in [0, 1), got {self.dropout}")


@ENCODERS.register("pddformer")
class PDDFormer(Encoder):
    """Attention layers on the k-nearest graph with gating blocks between them that see the
    distance rows. 4,332,800 parameters by default.

    Invariant to rotation, reflection, translation and the choice of unit cell; not to a supercell,
    in which an atom's share of the atomic number (column 0 of `pdd`) is smaller and, as published,
    edges to what were own images count half.
    """

    Config = PDDFormerConfig
    tiny: ClassVar = {"width": 32, "layers": 2, "rbf_bins": 32, "pdd": 16, "neighbors": 8}

    def __init__(self, config: PDDFormerConfig) -> None:
        super().__init__()
        self.dim = config.width
        self.graph = GraphSpec(
            neighbors=config.neighbors,
            pdd=config.pdd,
            depth=config.layers,
            **config.near_rules(),
        )
        self.embed_node = OneHotLinear(config.node_inputs, config.width)
        self.embed_edge = nn.Sequential(
            RBF(-4.0, 0.0, config.rbf_bins),
            nn.Linear(config.rbf_bins, config.width),
            nn.Softplus(),
        )
        self.embed_pdd = nn.Linear(1 + config.pdd, config.width)
        self.convs = nn.ModuleList(ComformerConv(config.width) for _ in range(config.layers))
        self.gates = nn.ModuleList(
            ZeoConv(config.width, config.dropout, DROPOUT_SALT + i)
            for i in range(config.layers - 1)
        )

    def nodes(self, batch: CrystalBatch) -> Tensor:
        edges = Edges.of(batch)
        x = self.embed_node(batch.node_numbers)
        features = self.embed_edge((-0.75 / batch.distances).clamp(min=-4.0))
        state = self.embed_pdd(batch.pdd)
        x = self.convs[0](x, features, edges, batch.node_multiplicity)
        for gate, conv in zip(self.gates, self.convs[1:], strict=True):
            x, state = gate(x, state, batch)
            x = conv(x, features, edges, batch.node_multiplicity)
        return x


class ZeoConv(nn.Module):
    """Gates node features by the running state that started as the distance rows; 263,680
    parameters at width 256. Its dropout drops all atoms of a node together."""

    def __init__(self, dim: int, dropout: float, salt: int) -> None:
        super().__init__()
        self.dropout, self.salt = dropout, salt
        self.norm = BatchNorm(dim)
        self.split = nn.Linear(dim, 2 * dim)
        self.mix = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, state: Tensor, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
        """New node features and new state, both [N, D], from both."""
        state = state + x
        u1, u2 = self.split(self.norm(state, batch.node_multiplicity)).chunk(2, dim=1)
        u2 = keyed_dropout(F.gelu(u2), batch.node_rng_key, self.dropout, self.salt, self.training)
        return self.out(self.mix(u1) * u2) + x, state
