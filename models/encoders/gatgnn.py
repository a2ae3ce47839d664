"""GATGNN: attention over neighbours, then over the atoms of the crystal by its composition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, NearestConfig, check_positive
from crysforge.models.layers.basic import RBF, OneHotLinear, group_rows
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.norm import BatchNorm
from crysforge.models.ops.precision import full_precision
from crysforge.models.ops.segments import (
    gather_source,
    gather_target,
    mean_readout,
    segment_softmax,
    segment_sum,
)

SLOPE = 0.2
"""Of the leaky rectifier behind the embedding of edges."""


@dataclass(kw_only=True)
class GATGNNConfig(NearestConfig):
    """Settings of GATGNN; the defaults are the published ones."""

    width: int = 64
    """Channels of nodes, edges and each head."""
    layers: int = 3
    heads: int = 4
    attention: int = 32
    """Channels of the attention over atoms."""
    rbf_bins: int = 41
    """Gaussians on the distance from 0 to 8 Å, as wide as their spacing."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    neighbors: int = 12
    """Nearest neighbours of the graph."""

    def __post_init__(self) -> None:
        names = ("width", "layers", "heads", "attention", "node_inputs", "neighbors")
        check_positive(self, "gatgnn", *names)


@ENCODERS.register("gatgnn")
class GATGNN(Encoder):
    """GATGNN (Louis et al., Phys. Chem. Chem. Phys. 22, 18141, 2020) with its attention over atoms
    by composition (GI-M1), without the layers behind the sum; 116,728 parameters by default.

    The attention over atoms weighs a sum; latents hold the weights times the number of atoms, so
    that the mean over atoms is that sum. Elements are one-hot; the composition counts what is seen,
    masked atoms as an element of their own. The published graph has 12 neighbours in list order;
    here ties are kept and neighbours are mutual. Invariant to rotation, reflection, translation and
    the choice of unit cell.
    """

    Config = GATGNNConfig
    tiny: ClassVar = {
        "width": 16, "layers": 2, "heads": 2, "attention": 8, "rbf_bins": 21, "neighbors": 6,
    }  # fmt: skip

    def __init__(self, config: GATGNNConfig) -> None:
        super().__init__()
        self.dim = width = config.width
        self.inputs = config.node_inputs
        self.graph = GraphSpec(
            neighbors=config.neighbors, depth=config.layers, **config.near_rules()
        )
        self.embed_node = OneHotLinear(config.node_inputs, width)
        spacing = 8.0 / max(config.rbf_bins - 1, 1)
        self.rbf = RBF(0.0, 8.0, config.rbf_bins, gamma=spacing**-2)
        self.embed_edge = nn.Linear(config.rbf_bins, width)
        self.convs = nn.ModuleList(GATGNNConv(width, config.heads) for _ in range(config.layers))
        self.norms = nn.ModuleList(BatchNorm(width) for _ in range(config.layers))
        self.score = nn.Sequential(
            nn.Linear(width + config.node_inputs, config.attention),
            nn.Softplus(),
            nn.Linear(config.attention, 1, bias=False),  # the softmax takes it away
        )

    def nodes(self, batch: CrystalBatch) -> Tensor:
        edges = Edges.of(batch)
        x = self.embed_node(batch.node_numbers)
        features = F.leaky_relu(_wide(self.embed_edge, self.rbf(batch.distances)), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.softplus(norm(full_precision(conv(x, features, edges)), batch.node_multiplicity))
        return x * self._importance(x, batch)

    def _importance(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """[N, 1] attention over the atoms of each crystal, of mean 1 over them."""
        element = F.one_hot(batch.node_numbers, self.inputs).to(x)
        composition = mean_readout(element, batch).to(x)[batch.node_batch]
        score = full_precision(self.score(torch.cat([x, composition], dim=1)))
        top = score.new_full((batch.num_crystals, 1), -torch.inf)
        top = top.scatter_reduce(0, batch.node_batch[:, None], score.detach(), "amax")
        weight = torch.exp(score - top[batch.node_batch])
        return weight / group_rows(batch.node_batch, batch.node_ptr)(mean_readout(weight, batch))


class GATGNNConv(nn.Module):
    """One augmented graph attention layer; 33,352 parameters at width 64 and 4 heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.node = nn.Linear(dim, heads * dim, bias=False)
        self.edge = nn.Linear(dim, heads * dim, bias=False)
        self.attention = nn.Parameter(torch.empty(2, heads, dim))
        self.norm_score = BatchNorm(heads)
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.attention)

    def forward(self, x: Tensor, features: Tensor, edges: Edges) -> Tensor:
        """Node features [N, D] from x [N, D] and edge feature rows [R, D]."""
        ours, rows = _wide(self.node, x), edges.from_row(_wide(self.edge, features))
        target, source = (
            F.softplus(gather(ours, edges) + rows).view(len(edges), self.heads, x.shape[1])
            for gather in (gather_target, gather_source)
        )
        score = (target * self.attention[0] + source * self.attention[1]).sum(dim=-1)
        score = F.softplus(self.norm_score(F.softplus(full_precision(score)), edges.weight))
        share = segment_softmax(score, edges).to(source)
        messages = (source * share[..., None]).mean(dim=1)
        return segment_sum(messages, edges) + self.bias


def _wide(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in full precision, autocast or not: batch norms take the mean of softplus away, and
    bf16 has too few digits for what is left."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(full_precision(x), layer.weight, layer.bias)
