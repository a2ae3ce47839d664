"""MEGNet: edges, atoms and a state of the whole crystal update one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, check_positive
from crysforge.models.layers.basic import RBF, EdgeLinear, OneHotLinear, group_rows, own_rows
from crysforge.models.ops.edges import Edges, Incidence
from crysforge.models.ops.precision import full_precision
from crysforge.models.ops.segments import mean_readout, segment_sum


@dataclass(kw_only=True)
class MEGNetConfig:
    """Settings of MEGNet; the defaults are the released code's."""

    width: int = 32
    """Channels of edges, nodes and state. A latent has three times as many."""
    hidden: int = 64
    """Channels inside their perceptrons."""
    layers: int = 3
    embedding: int = 16
    """Channels of elements."""
    rbf_bins: int = 100
    """Gaussians on the distance, from 0 to 1 Å beyond the radius."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    radius: float = 4.0
    """Å within which atoms are neighbours."""

    def __post_init__(self) -> None:
        names = ("width", "hidden", "layers", "embedding", "node_inputs")
        check_positive(self, "megnet", *names)


@ENCODERS.register("megnet")
class MEGNet(Encoder):
    """MEGNet (Chen et al., Chem. Mater. 31, 3564, 2019) without its readout; 156,992 parameters by
    default.

    Published, a crystal is read out as [atoms; bonds; state], where a set2set stands for all atoms
    and another for all bonds. Here the latent of an atom is [its features; the mean of its bonds'
    features; the state of its crystal], so that the mean over atoms that all encoders share gives
    the same three parts, with means for set2sets. The state starts from a learned vector: released,
    it is two zeros taken through a perceptron, hence also the same for every crystal.

    Invariant to rotation, reflection, translation and the choice of cell, supercells too.
    """

    Config = MEGNetConfig
    tiny: ClassVar = {
        "width": 8,
        "hidden": 12,
        "layers": 2,
        "embedding": 8,
        "rbf_bins": 20,
    }
    supercell = True

    def __init__(self, config: MEGNetConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.dim = 3 * width
        self.graph = GraphSpec(radius=config.radius, depth=config.layers)
        self.rbf = RBF(0.0, config.radius + 1, config.rbf_bins, gamma=0.5**-2)
        self.embed_element = OneHotLinear(config.node_inputs, config.embedding)
        self.embed_node = perceptron(config.embedding, hidden, width)
        self.embed_edge = perceptron(config.rbf_bins, hidden, width)
        self.state = nn.Parameter(torch.randn(width))
        self.blocks = nn.ModuleList(
            MEGNetBlock(width, hidden, first=i == 0) for i in range(config.layers)
        )
        self.apply(_initialise)
        nn.init.normal_(self.embed_element.weight)

    def nodes(self, batch: CrystalBatch) -> Tensor:
        edges = Edges.of(batch)
        members = group_rows(batch.node_batch, batch.node_ptr)
        x = self.embed_node(self.embed_element(batch.node_numbers))
        features = self.embed_edge(self.rbf(batch.distances))
        state = self.state.expand(batch.num_crystals, -1)
        for i, block in enumerate(self.blocks):
            features, x, state = block(features, x, state, edges, members, batch)
            edges = own_rows(edges) if i == 0 else edges
        return torch.cat([x, mean_over_edges(features, edges), members(state)], dim=1)


class MEGNetBlock(nn.Module):
    """One MEGNet block: dense layers (but in the first block), then new edges, from them new nodes,
    from both a new state, each added to what was there. 39,392 parameters by default in the first
    block, 51,968 in the others."""

    def __init__(self, width: int, hidden: int, first: bool) -> None:
        super().__init__()
        self.dense_edge, self.dense_node, self.dense_state = (
            nn.Identity() if first else perceptron(width, hidden, width) for _ in range(3)
        )
        self.edge_by_ends = EdgeLinear(width, width, hidden)
        self.edge_by_state = nn.Linear(width, hidden, bias=False)
        self.edge_update = _tail(hidden, width)
        self.node_update = nn.Sequential(nn.Linear(3 * width, hidden), _tail(hidden, width))
        self.state_update = nn.Sequential(nn.Linear(3 * width, hidden), _tail(hidden, width))

    def forward(
        self,
        features: Tensor,
        x: Tensor,
        state: Tensor,
        edges: Edges,
        members: Incidence,
        batch: CrystalBatch,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New features of every edge [E, D], of nodes [N, D] and of crystals [B, D].

        Args:
            features: [R, D], the rows that `edges.row` points into. x: [N, D]. state: [B, D].
            members: [N, B] the crystal of every node.
        """
        e, v, u = self.dense_edge(features), self.dense_node(x), self.dense_state(state)
        offset = members(self.edge_by_state(u))
        e = self.edge_update(self.edge_by_ends(v, e, edges, offset))
        around = mean_over_edges(e, edges)
        v = self.node_update(torch.cat([around.to(v.dtype), v, members(u).to(v.dtype)], dim=1))
        of_edges, of_nodes = mean_over_crystals(e, edges, batch), mean_readout(v, batch)
        u = self.state_update(torch.cat([of_edges, of_nodes, full_precision(u)], dim=1))
        return edges.from_row(features) + e, x + v, state + u


def mean_over_edges(e: Tensor, edges: Edges) -> Tensor:
    """Mean over the edges into each node, [E, D] → [N, D]; zero where there are none."""
    degree = segment_sum(full_precision(edges.count.new_ones(len(edges), 1)), edges)
    return segment_sum(full_precision(e), edges) / degree.clamp(min=1)


def mean_over_crystals(e: Tensor, edges: Edges, batch: CrystalBatch) -> Tensor:
    """Mean over the edges of each crystal, [E, D] → [B, D]; zero where there are none."""
    degree = segment_sum(full_precision(edges.count.new_ones(len(edges), 1)), edges)
    total = mean_readout(segment_sum(full_precision(e), edges), batch)
    degree = mean_readout(degree, batch)
    return total / torch.where(degree > 0, degree, 1)


class ShiftedSoftplus(nn.Module):
    """log(1 + exp x) - log 2, which is 0 at 0; fp32 or wider, since few digits of bf16 are left of
    the difference."""

    def forward(self, x: Tensor) -> Tensor:
        x = full_precision(x)
        return F.softplus(x) - 0.6931471805599453


def _initialise(module: nn.Module) -> None:
    """As released: PyTorch's own start is so small that after these perceptrons, each with two or
    three layers, crystals hardly differ."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def perceptron(inputs: int, hidden: int, out: int) -> nn.Sequential:
    """Two layers, each with its activation."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), ShiftedSoftplus(), nn.Linear(hidden, out), ShiftedSoftplus()
    )


def _tail(hidden: int, out: int) -> nn.Sequential:
    """The rest of an update's perceptron after its first linear layer. As in the released code, the
    last layer has no activation."""
    return nn.Sequential(
        ShiftedSoftplus(), nn.Linear(hidden, hidden), ShiftedSoftplus(), nn.Linear(hidden, out)
    )
