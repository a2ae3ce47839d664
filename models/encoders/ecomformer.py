"""eComFormer: ComFormer attention with one update that passes vectors and tensors on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, NearestConfig, check_positive
from crysforge.models.layers.basic import RBF, ComformerConv, OneHotLinear
from crysforge.models.layers.spherical import spherical_harmonics
from crysforge.models.ops.edges import Edges, Incidence, RowSum
from crysforge.models.ops.norm import BatchNorm
from crysforge.models.ops.precision import full_precision
from crysforge.models.ops.segments import gather_source, segment_sum


@dataclass(kw_only=True)
class EComFormerConfig(NearestConfig):
    """Settings of eComFormer; the defaults are the published ones."""

    width: int = 256
    """Channels of nodes and edges."""
    layers: int = 3
    """Attention layers; the equivariant update comes after the first."""
    scalars: int = 64
    """Scalar channels of the equivariant update."""
    tensors: int = 8
    """Its channels of vectors (l = 1), and as many of tensors (l = 2)."""
    rbf_bins: int = 256
    """Gaussians on -0.75/distance."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    neighbors: int = 25
    """Nearest neighbours of the graph, to which lattice self-edges are added."""

    def __post_init__(self) -> None:
        check_positive(
            self, "ecomformer", "width", "scalars", "tensors", "node_inputs", "neighbors"
        )
        if self.layers < 2:
            raise ValueError(f"ecomformer layers must be at least 2, got {self.layers}")


@ENCODERS.register("ecomformer")
class EComFormer(Encoder):
    """eComFormer (Yan et al., ICLR 2024) without its readout; 5,524,672 parameters by default.

    Invariant to rotation, reflection, translation and, where no two of the shortest lattice vectors
    are equally long, the choice of unit cell. Not to a supercell, whose lattice vectors are others.
    """

    Config = EComFormerConfig
    tiny: ClassVar = {
        "width": 24,
        "layers": 2,
        "scalars": 8,
        "tensors": 4,
        "rbf_bins": 24,
        "neighbors": 6,
    }

    def __init__(self, config: EComFormerConfig) -> None:
        super().__init__()
        width = config.width
        self.dim = width
        self.graph = GraphSpec(
            neighbors=config.neighbors,
            lattice_edges="comformer",
            vectors=True,
            **config.near_rules(),
        )
        self.embed_node = OneHotLinear(config.node_inputs, width)
        self.embed_length = nn.Sequential(
            RBF(-4.0, 0.0, config.rbf_bins), nn.Linear(config.rbf_bins, width), nn.Softplus()
        )
        self.convs = nn.ModuleList(ComformerConv(width) for _ in range(config.layers))
        self.update = EquivariantUpdate(width, config.scalars, config.tensors)

    def nodes(self, batch: CrystalBatch) -> Tensor:
        assert batch.edge_vector is not None
        edges = Edges.of(batch)
        x = self.embed_node(batch.node_numbers)
        features = self.embed_length((-0.75 / batch.distances).clamp(min=-4.0))
        x = self.convs[0](x, features, edges, batch.node_multiplicity)
        harmonics = spherical_harmonics(F.normalize(batch.edge_vector, dim=1), 3)
        x = self.update(x, features, harmonics, edges)
        for conv in self.convs[1:]:
            x = conv(x, features, edges, batch.node_multiplicity)
        return x


class EquivariantUpdate(nn.Module):
    """ComFormer's node-wise equivariant update: two tensor products with the spherical harmonics of
    the edges, the first of which makes vectors and tensors of scalars, the second scalars of all.
    What they weigh each path with is a function of the edge, linear in its last layer.

    2,862,272 parameters at width 256, 64 scalars and 8 tensors. Paths are scaled as in e3nn
    (`irrep_normalization="component"`, `path_normalization="element"`).

    No weights are made for an edge. Written out, a product is a sum over hidden channels h of the
    edge, channels s of its source and a weight w_{hs·}. The first one sums w · s once for every
    source, the second one h · s for every target; what is left for an edge is small.
    """

    def __init__(self, dim: int, scalars: int, tensors: int) -> None:
        super().__init__()
        self.scalars, self.tensors = scalars, tensors
        both = scalars + 2 * tensors
        self.down = nn.Linear(dim, scalars)
        self.hidden_first, self.hidden_second = (nn.Linear(dim, dim) for _ in range(2))
        self.weigh_first, self.weigh_second = (nn.Linear(dim, scalars * both) for _ in range(2))
        self.norm = BatchNorm(scalars)
        self.out = nn.Linear(scalars, dim)
        self.skip = nn.Linear(dim, dim)

    def forward(self, x: Tensor, features: Tensor, harmonics: Tensor, edges: Edges) -> Tensor:
        """New node features [N, D] from x [N, D].

        Args:
            features: [R, D], the rows that `edges.row` points into.
            harmonics: [E, 9] of degrees 0, 1, 2; the squares of a degree's add up to 1.
        """
        groups = _Groups.of(edges)
        first, second = (
            full_precision(edges.from_row(F.softplus(layer(features))))
            for layer in (self.hidden_first, self.hidden_second)
        )
        degree = edges.ptr.diff().clamp(min=1)[:, None]
        scalars = self.down(x)
        messages = self._with_harmonics(self._first(scalars, first, groups), harmonics)
        y = full_precision(segment_sum(messages, edges) / degree)
        y = torch.cat([y[:, : self.scalars] + scalars, y[:, self.scalars :]], dim=1)
        products = self._products(gather_source(y, edges), harmonics)
        y = self._second(products, second, edges, groups) / degree
        y = F.softplus(self.out(F.softplus(self.norm(full_precision(y)))))
        return full_precision(y + self.skip(x))

    def _first(self, scalars: Tensor, hidden: Tensor, groups: _Groups) -> Tensor:
        """[E, S + 2T] from the sources' scalars [N, S] and [E, D]."""
        n, dim = len(scalars), hidden.shape[1]
        weight = self.weigh_first.weight.view(self.scalars, -1)
        of_source = (scalars @ weight).view(n, -1, dim)
        messages = groups.by_source(hidden).view(n, -1, dim) @ of_source.transpose(1, 2)
        bias = scalars @ self.weigh_first.bias.view(self.scalars, -1)
        messages = (messages + bias[:, None]) / math.sqrt(self.scalars)
        return groups.from_source(full_precision(messages).flatten(0, 1))

    def _with_harmonics(self, messages: Tensor, harmonics: Tensor) -> Tensor:
        """[E, S + 2T] → [E, S + 8T]: scalars, vectors, tensors, of which a channel's components
        follow one another."""
        sizes = [self.scalars, self.tensors, self.tensors]
        parts = [
            math.sqrt(2 * degree + 1) * (part[:, :, None] * y[:, None]).flatten(1)
            for degree, (part, y) in enumerate(
                zip(messages.split(sizes, 1), harmonics.split([1, 3, 5], 1), strict=True)
            )
        ]
        return torch.cat(parts, dim=1)

    def _products(self, y: Tensor, harmonics: Tensor) -> Tensor:
        """[E, S + 8T] → [E, S + 2T]: scalar products with the harmonics of the same degree."""
        t = self.tensors
        parts = [
            (part.unflatten(1, (-1, h.shape[1])) * h[:, None]).sum(2)
            for part, h in zip(
                y.split([self.scalars, 3 * t, 5 * t], 1), harmonics.split([1, 3, 5], 1), strict=True
            )
        ]
        return full_precision(torch.cat(parts, dim=1))

    def _second(self, products: Tensor, hidden: Tensor, edges: Edges, groups: _Groups) -> Tensor:
        """[N, S], summed over the edges into each node, from [E, S + 2T] and [E, D]."""
        n, paths = edges.num_nodes, products.shape[1]
        left, right = (groups.by_target(z).view(n, -1, z.shape[1]) for z in (products, hidden))
        outer = (left.transpose(1, 2) @ right).flatten(1)
        weight = self.weigh_second.weight.view(self.scalars, -1)
        bias = self.weigh_second.bias.view(self.scalars, -1)
        total = segment_sum(products, edges)
        return (F.linear(outer, weight) + F.linear(total, bias)) / math.sqrt(paths)


class _Groups:
    """Edges laid out node by node, W slots each, as many as the largest node needs; [E, D] to
    [N·W, D] and back. The device is waited for where nobody has counted them."""

    def __init__(self, by_source: Incidence, by_target: Incidence) -> None:
        self.by_source, self.by_target = by_source, by_target
        self.from_source = Incidence(by_source.transpose, by_source.forward)

    @classmethod
    def of(cls, edges: Edges) -> _Groups:
        into = edges.into.forward
        groups = edges.from_source.transpose, RowSum(into.index, into.ptr)
        most = edges.most or int(torch.stack([g.ptr.diff().max() for g in groups]).max())
        return cls(*(_slots(g, max(1, most)) for g in groups))


def _slots(group: RowSum, width: int) -> Incidence:
    """[N·W, E]: puts the edges of group n, in their order, into the slots from n·W."""
    e = len(group.index)
    each = torch.arange(max(width, e + 1), device=group.ptr.device)
    size = group.ptr.diff()
    starts = group.ptr[:-1, None] + torch.minimum(each[:width], size[:, None])
    slot = torch.empty_like(group.index)
    owner = torch.repeat_interleave(size, output_size=e)
    slot[group.index] = owner * width + each[:e] - group.ptr[owner]
    return Incidence(
        RowSum(group.index, torch.cat([starts.flatten(), group.ptr[-1:]])),
        RowSum(slot, each[: e + 1], each=1),
    )
