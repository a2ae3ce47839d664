"""PotNet: gated messages over nearest neighbours and over sums of all images of every atom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, NearestConfig, check_positive
from crysforge.models.layers.basic import RBF, EdgeLinear, OneHotLinear, row_weight
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.messages import comformer_messages
from crysforge.models.ops.norm import BatchNorm

REPULSIONS = ("scaled", "exact")


@dataclass(kw_only=True)
class PotNetConfig(NearestConfig):
    """Settings of PotNet; the defaults are the published ones."""

    width: int = 256
    """Channels of nodes and edges."""
    layers: int = 3
    rbf_bins: int = 256
    """Gaussians on -0.75/distance from -4 to 4, as wide as their spacing."""
    sum_bins: int = 64
    """Multiquadrics on the lattice sums from -4 to 4."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    neighbors: int = 16
    """Nearest neighbours of the graph, to which all pairs of atoms are added."""
    repulsion: str = "scaled"
    """How the repulsion of a pair decays, see `GraphSpec.pair_sums`."""

    def __post_init__(self) -> None:
        check_positive(self, "potnet", "width", "layers", "node_inputs", "neighbors")
        if self.repulsion not in REPULSIONS:
            raise ValueError(f"potnet repulsion is scaled or exact, not {self.repulsion!r}")


@ENCODERS.register("potnet")
class PotNet(Encoder):
    """PotNet (Lin et al., ICML 2023) without its readout; 1,692,672 parameters by default.

    The published local graph gives each atom 16 neighbours, in list order where distances tie; here
    ties are kept and neighbours are mutual. Invariant to rotation, reflection, translation and the
    choice of unit cell; not to a supercell, where a sum goes over fewer images.
    """

    Config = PotNetConfig
    tiny: ClassVar = {"width": 24, "layers": 2, "rbf_bins": 64, "sum_bins": 16, "neighbors": 6}

    def __init__(self, config: PotNetConfig) -> None:
        super().__init__()
        width, bins = config.width, config.rbf_bins
        self.dim = width
        self.graph = GraphSpec(
            neighbors=config.neighbors,
            pair_sums="scaled" if config.repulsion == "scaled" else "exact",
            depth=config.layers,
            **config.near_rules(),
        )
        self.embed_node = OneHotLinear(config.node_inputs, width)
        self.embed_length = nn.Sequential(
            RBF(-4.0, 4.0, bins, gamma=((bins - 1) / 8) ** 2), nn.Linear(bins, width), nn.SiLU()
        )
        self.embed_sum = nn.Sequential(
            Multiquadric(-4.0, 4.0, config.sum_bins),
            nn.Linear(config.sum_bins, width),
            nn.Softplus(),
        )
        self.norm_sum = BatchNorm(width)
        self.convs = nn.ModuleList(PotNetConv(width) for _ in range(config.layers))

    def nodes(self, batch: CrystalBatch) -> Tensor:
        assert batch.pair_sums is not None
        edges = Edges.of(batch)
        x = self.embed_node(batch.node_numbers)
        # A row is a length or a sum. Both layers see all rows, which no device has to sort.
        is_sum = torch.isinf(batch.distances)
        near = self.embed_length((-0.75 / batch.distances).clamp(min=-4.0))
        with torch.autocast(
            x.device.type, enabled=False
        ):  # sums differ little; a norm spreads them
            far = self.embed_sum(batch.pair_sums)
        far = self.norm_sum(far, row_weight(edges) * is_sum)
        features = torch.where(is_sum[:, None], far, near)
        for conv in self.convs:
            x = conv(x, features, edges, batch.node_multiplicity)
        return x


class Multiquadric(nn.Module):
    """sqrt(1 + ((x - c) / spacing)²) on `bins` centres evenly on [start, end]."""

    def __init__(self, start: float, end: float, bins: int) -> None:
        super().__init__()
        if bins < 2:
            raise ValueError(f"a radial basis needs at least 2 bins, got {bins}")
        self.start, self.end, self.bins = start, end, bins

    def forward(self, x: Tensor) -> Tensor:
        """[n] → [n, bins]."""
        centres = torch.linspace(self.start, self.end, self.bins, device=x.device, dtype=x.dtype)
        spacing = (self.end - self.start) / (self.bins - 1)
        return ((x[:, None] - centres) / spacing).square_().add_(1).sqrt_()


class PotNetConv(nn.Module):
    """One PotNet layer; 526,336 parameters at width 256."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score_hidden, self.value_hidden = (EdgeLinear(dim, dim, dim) for _ in range(2))
        self.score_out, self.value_out = (nn.Linear(dim, dim) for _ in range(2))
        self.norm_score, self.norm_out = BatchNorm(dim), BatchNorm(dim)

    def forward(
        self, x: Tensor, features: Tensor, edges: Edges, node_multiplicity: Tensor
    ) -> Tensor:
        """New node features [N, D], none negative, from x [N, D] and edge features [R, D]."""
        messages = comformer_messages(
            torch.ones_like(x),  # ComFormer's score without a query
            self.score_hidden.table(x, features),
            self.value_hidden.table(x, features),
            self.score_out,
            self.value_out,
            self.norm_score,
            edges,
        )
        return F.relu(x + self.norm_out(messages, node_multiplicity))
