"""iComFormer: ComFormer attention whose edges know their angles with the lattice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, NearestConfig, check_positive
from crysforge.models.layers.basic import (
    RBF,
    ComformerConv,
    OneHotLinear,
    compose,
    group_rows,
    own_rows,
)
from crysforge.models.ops.edges import Edges, Incidence
from crysforge.models.ops.norm import BatchNorm
from crysforge.models.ops.precision import full_precision


@dataclass(kw_only=True)
class IComFormerConfig(NearestConfig):
    """Settings of iComFormer; the defaults are the published ones."""

    width: int = 256
    """Channels of nodes and edges."""
    layers: int = 4
    """Node attention layers; the edge layer comes after the first."""
    rbf_bins: int = 256
    """Gaussians on -0.75/distance, and on the cosines of the angles."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    neighbors: int = 25
    """Nearest neighbours of the graph, to which lattice self-edges are added."""

    def __post_init__(self) -> None:
        check_positive(self, "icomformer", "width", "node_inputs", "neighbors")
        if self.layers < 2:
            raise ValueError(f"icomformer layers must be at least 2, got {self.layers}")


@ENCODERS.register("icomformer")
class IComFormer(Encoder):
    """iComFormer (Yan et al., ICLR 2024) without its readout; 4,833,280 parameters by default.

    Invariant to proper rotation, translation and, where no two of the shortest lattice vectors are
    equally long, the choice of unit cell. Not to reflection: the lattice triple has a handedness.
    Not to a supercell, whose lattice vectors are others.
    """

    Config = IComFormerConfig
    tiny: ClassVar = {"width": 24, "layers": 2, "rbf_bins": 24, "neighbors": 6}

    def __init__(self, config: IComFormerConfig) -> None:
        super().__init__()
        width, bins = config.width, config.rbf_bins
        self.dim = width
        self.graph = GraphSpec(
            neighbors=config.neighbors,
            lattice_edges="comformer",
            vectors=True,
            lattice_triple=True,
            **config.near_rules(),
        )
        self.embed_node = OneHotLinear(config.node_inputs, width)
        self.embed_length = nn.Sequential(
            RBF(-4.0, 0.0, bins), nn.Linear(bins, width), nn.Softplus()
        )
        self.embed_cosine = nn.Sequential(
            RBF(-1.0, 1.0, bins), nn.Linear(bins, width), nn.Softplus()
        )
        self.convs = nn.ModuleList(ComformerConv(width) for _ in range(config.layers))
        self.update_edges = LatticeAttention(width)

    def nodes(self, batch: CrystalBatch) -> Tensor:
        assert batch.lattice_triple is not None and batch.edge_vector is not None
        edges, count = Edges.of(batch), batch.node_multiplicity
        x = self.embed_node(batch.node_numbers)
        features = self.embed_length(_scalar(batch.distances))
        x = self.convs[0](x, features, edges, count)

        crystal = batch.node_batch[edges.target]
        length = batch.lattice_triple.norm(dim=2)
        partners = self.embed_length(_scalar(length.flatten())).unflatten(0, (-1, 3))
        axes = (batch.lattice_triple / length[..., None])[crystal]
        cosines = (axes * F.normalize(batch.edge_vector, dim=1)[:, None]).sum(2)
        angles = self.embed_cosine(cosines.flatten().clamp(-1, 1))
        of_crystal = group_rows(crystal, edges.ptr[batch.node_ptr])
        features = self.update_edges(features, partners, angles, edges, of_crystal)

        edges = own_rows(edges)
        for conv in self.convs[1:]:
            x = conv(x, features, edges, count)
        return x


def _scalar(length: Tensor) -> Tensor:
    """A length in Å as ComFormer's Coulomb-like scalar in [-4, 0)."""
    return (-0.75 / length).clamp(min=-4.0)


class LatticeAttention(nn.Module):
    """ComFormer's edge layer: an edge attends to the three invariant lattice vectors, whose lengths
    and angles with the edge make keys and values; 1,249,792 parameters at width 256."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.partner_key, self.partner_value = (nn.Linear(dim, 3 * dim) for _ in range(2))
        self.angle = nn.Linear(dim, dim, bias=False)
        self.key_hidden, self.value_hidden = (nn.Linear(3 * dim, dim) for _ in range(2))
        self.key_out, self.value_out = (nn.Linear(dim, dim) for _ in range(2))
        self.norm_score, self.norm_out = BatchNorm(dim), BatchNorm(dim)

    def forward(
        self, features: Tensor, partners: Tensor, angles: Tensor, edges: Edges, crystal: Incidence
    ) -> Tensor:
        """Features of each edge, [E, D], all positive.

        Args:
            features: [R, D], the rows that `edges.row` points into.
            partners: [B, 3, D] of the lattice vectors' lengths.
            angles: [3E, D] of the cosines, an edge's three after one another.
            crystal: product with [B, …] gives the row of every edge's crystal.
        """
        dim = features.shape[1]
        # A weight on [edge; partner; angle] has three blocks, each applied where its input lives.
        key_blocks, value_blocks = (
            layer.weight.split(dim, 1) for layer in (self.key_hidden, self.value_hidden)
        )
        own = torch.cat(
            [
                compose(features, key_blocks[0], self.key, self.key_hidden.bias),
                compose(features, value_blocks[0], self.value, self.value_hidden.bias),
            ],
            dim=1,
        )
        by_partner = torch.cat(
            [
                F.linear(_each_own(self.partner_key, partners), key_blocks[1]),
                F.linear(_each_own(self.partner_value, partners), value_blocks[1]),
            ],
            dim=2,
        )
        turn = torch.cat([key_blocks[2], value_blocks[2]]) @ self.angle.weight
        hidden = F.linear(angles, turn).unflatten(0, (-1, 3))
        hidden = hidden + crystal(by_partner.flatten(1)).view_as(hidden)
        hidden = F.silu(hidden + edges.from_row(own)[:, None])
        key, value = self.key_out(hidden[..., :dim]), self.value_out(hidden[..., dim:])
        query = full_precision(edges.from_row(self.query(features) / math.sqrt(dim)))
        score = (query[:, None] * key).flatten(0, 1)
        gate = torch.sigmoid(self.norm_score(score)).view_as(value)
        update = F.linear((gate * value).sum(1), self.out.weight, 3 * self.out.bias)
        return F.softplus(edges.from_row(features) + self.norm_out(full_precision(update)))


def _each_own(layer: nn.Linear, partners: Tensor) -> Tensor:
    """[B, 3, D] → [B, 3, D]: a third of the layer's outputs from each lattice vector."""
    weight, bias = layer.weight.unflatten(0, (3, -1)), layer.bias.unflatten(0, (3, -1))
    return torch.einsum("bkd,kod->bko", partners, weight) + bias
