"""ALIGNN: gated convolutions on atoms and their bonds, and on bonds and their angles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, NearestConfig, check_positive
from crysforge.models.layers.basic import RBF, OneHotLinear, line_graph, own_rows, row_weight
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.norm import BatchNorm
from crysforge.models.ops.precision import full_precision
from crysforge.models.ops.segments import gather_sum

_BLOCK = 1 << 18
"""Elements of a block's buffers on CPU: 1 MB in fp32."""

sigmoid_backward = torch.ops.aten.sigmoid_backward


@dataclass(kw_only=True)
class ALIGNNConfig(NearestConfig):
    """Settings of ALIGNN; the defaults are the published ones."""

    width: int = 256
    """Channels of atoms, bonds and angles."""
    embedding: int = 64
    """Channels between a basis and bonds or angles."""
    alignn_layers: int = 4
    """Layers that update atoms, bonds and angles."""
    gcn_layers: int = 4
    """Layers after them that update atoms and bonds."""
    rbf_bins: int = 80
    """Gaussians on the distance from 0 to 8 Å."""
    angle_bins: int = 40
    """Gaussians on the cosine of the angle."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    neighbors: int = 12
    """Nearest neighbours of the graph."""

    def __post_init__(self) -> None:
        names = ("width", "embedding", "alignn_layers", "gcn_layers", "node_inputs", "neighbors")
        check_positive(self, "alignn", *names)


@ENCODERS.register("alignn")
class ALIGNN(Encoder):
    """ALIGNN (Choudhary and DeCost, npj Comput. Mater. 7, 185, 2021) without its readout;
    4,032,384 parameters by default.

    Left out are two batch norms that nothing depends on: of the last layer's bonds and of the
    angles in the last layer that has them. The published graph looks for neighbours within 8 Å;
    here an atom with a sparse surrounding gets its nearest from beyond. Invariant to rotation,
    reflection, translation and the choice of unit cell. Memory goes with the number of angles,
    which is the sum of the squared numbers of neighbours: some 23 kB each in training by default.
    """

    Config = ALIGNNConfig
    tiny: ClassVar = {
        "width": 12,
        "embedding": 8,
        "alignn_layers": 2,
        "gcn_layers": 1,
        "rbf_bins": 20,
        "angle_bins": 12,
        "neighbors": 4,
    }

    def __init__(self, config: ALIGNNConfig) -> None:
        super().__init__()
        width, layers = config.width, config.alignn_layers
        self.dim = width
        self.graph = GraphSpec(neighbors=config.neighbors, vectors=True, **config.near_rules())
        self.embed_node = OneHotLinear(config.node_inputs, width)
        self.norm_node = BatchNorm(width)
        hidden = config.embedding
        self.embed_bond = ScalarEmbedding(RBF(0.0, 8.0, config.rbf_bins), hidden, width)
        self.embed_angle = ScalarEmbedding(RBF(-1.0, 1.0, config.angle_bins), hidden, width)
        self.on_atoms = nn.ModuleList(
            GatedConv(width, updates_edges=i < layers + config.gcn_layers - 1)
            for i in range(layers + config.gcn_layers)
        )
        self.on_bonds = nn.ModuleList(
            GatedConv(width, updates_edges=i < layers - 1) for i in range(layers)
        )

    def nodes(self, batch: CrystalBatch) -> Tensor:
        assert batch.edge_vector is not None
        bonds = Edges.of(batch)
        angles = line_graph(bonds)
        x = F.silu(self.norm_node(self.embed_node(batch.node_numbers), batch.node_multiplicity))
        y = self.embed_bond(batch.distances, row_weight(bonds))
        z = self.embed_angle(_cosines(batch.edge_vector, angles), angles.weight)
        for i, conv in enumerate(self.on_atoms):
            x, y = conv(x, y, bonds)
            bonds = own_rows(bonds) if i == 0 else bonds
            if i < len(self.on_bonds):
                y, z = self.on_bonds[i](y, z, angles)
        return x


def _cosines(vectors: Tensor, angles: Edges) -> Tensor:
    """[T] cosine of the angle at j between the bonds i → j and j → k, 1 on the way back."""
    unit = F.normalize(vectors, dim=1)
    return -(unit[angles.source] * unit[angles.target]).sum(1).clamp(-1, 1)


class ScalarEmbedding(nn.Module):
    """A radial basis and two layers, each linear, normalised and with its activation."""

    def __init__(self, rbf: RBF, hidden: int, out: int) -> None:
        super().__init__()
        self.rbf = rbf
        self.hidden, self.norm_hidden = nn.Linear(rbf.bins, hidden), BatchNorm(hidden)
        self.out, self.norm_out = nn.Linear(hidden, out), BatchNorm(out)

    def forward(self, values: Tensor, weight: Tensor) -> Tensor:
        """[R] → [R, D]; a value counts `weight` [R] times in batch statistics."""
        x = full_precision(self.hidden(self.rbf(values)))
        x = full_precision(self.out(F.silu(self.norm_hidden(x, weight))))
        return F.silu(self.norm_out(x, weight))


class GatedConv(nn.Module):
    """Edge-gated graph convolution (Bresson and Laurent, arXiv:1711.07553): neighbours are averaged
    with the gates of their edges as weights, each channel for itself; 329,984 parameters at width
    256."""

    def __init__(self, dim: int, updates_edges: bool = True) -> None:
        super().__init__()
        self.gate_source, self.gate_target, self.gate_edge, self.own, self.source = (
            nn.Linear(dim, dim) for _ in range(5)
        )
        self.norm_node = BatchNorm(dim)
        self.norm_edge = BatchNorm(dim) if updates_edges else None

    def forward(self, x: Tensor, features: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """New features of nodes [N, D] and of every edge [E, D] (the old ones of rows where edges
        are not updated). Every node stands for one atom or bond.

        Args:
            x: [N, D]. features: [R, D], the rows that `edges.row` points into.
        """
        table = [self.gate_target(x), self.gate_source(x), self.gate_edge(features)]
        score = full_precision(gather_sum(torch.cat(table), edges))
        mean = _GatedMean.apply(score, full_precision(self.source(x)), edges)
        new = x + F.silu(self.norm_node(full_precision(self.own(x)) + mean))
        if self.norm_edge is None:
            return new, features
        return new, edges.from_row(features) + F.silu(self.norm_edge(score, edges.weight))


class _GatedMean(torch.autograd.Function):
    """Mean over the edges into each node of their source's values [N, D], each channel weighted by
    the sigmoid of its score [E, D]. Walks blocks of edges and keeps the scores alone, since in a
    line graph whatever has a row for every edge is large."""

    @staticmethod
    def forward(ctx, score: Tensor, values: Tensor, edges: Edges) -> Tensor:
        total, mean = torch.empty_like(values), torch.empty_like(values)
        for b in edges.blocks(_BLOCK // values.shape[1]):
            gate = torch.sigmoid(score[b.edges])
            total[b.nodes] = b.into(gate)
            mean[b.nodes] = b.into(gate.mul_(values.index_select(0, edges.source[b.edges])))
        total += 1e-6
        mean /= total
        ctx.save_for_backward(score, values, total, mean)
        ctx.edges = edges
        return mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        score, values, total, mean = ctx.saved_tensors
        edges = ctx.edges
        grad = grad / total
        dscore, dvalues = torch.empty_like(score), torch.empty_like(score)
        for b in edges.blocks(_BLOCK // values.shape[1]):
            gate = torch.sigmoid(score[b.edges])
            into = b.spread(grad)
            value = values.index_select(0, edges.source[b.edges])
            value -= mean.index_select(0, b.target)
            torch.mul(gate, into, out=dvalues[b.edges])
            sigmoid_backward(value.mul_(into), gate, grad_input=dscore[b.edges])
        return dscore, edges.from_source.transpose(dvalues), None
