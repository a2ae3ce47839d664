"""SchNet: continuous-filter convolutions within a radius, from PyG's blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_geometric.nn.models.schnet import InteractionBlock

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, check_positive
from crysforge.models.layers.basic import RBF, OneHotLinear
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.precision import full_precision
from crysforge.models.ops.segments import gather_source, segment_sum


@dataclass(kw_only=True)
class SchNetConfig:
    """Settings of SchNet; the defaults are PyG's, with the radius of the paper's crystals."""

    width: int = 128
    """Channels of nodes."""
    filters: int = 128
    """Channels of the filters."""
    layers: int = 6
    rbf_bins: int = 50
    """Gaussians on the distance from 0 to the radius."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    radius: float = 5.0
    """Å within which atoms are neighbours; filters fade to zero there."""

    def __post_init__(self) -> None:
        check_positive(self, "schnet", "width", "filters", "layers", "node_inputs")


@ENCODERS.register("schnet")
class SchNet(Encoder):
    """SchNet (Schütt et al., J. Chem. Phys. 148, 241722, 2018) without its readout; 450,048
    parameters by default.

    Weights and layers are those of `torch_geometric.nn.SchNet`; its message passing is done here,
    with periodic edges, one filter per distinct distance, and multiplicities. Invariant to
    rotation, reflection, translation and the choice of cell, supercells too.
    """

    Config = SchNetConfig
    tiny: ClassVar = {"width": 16, "filters": 16, "layers": 2, "rbf_bins": 20, "radius": 4.0}
    supercell = True

    def __init__(self, config: SchNetConfig) -> None:
        super().__init__()
        self.dim = config.width
        self.radius = config.radius
        self.graph = GraphSpec(radius=config.radius, depth=config.layers)
        self.embed_node = OneHotLinear(config.node_inputs, config.width)
        nn.init.normal_(self.embed_node.weight)
        spacing = config.radius / max(config.rbf_bins - 1, 1)
        self.rbf = RBF(0.0, config.radius, config.rbf_bins, gamma=0.5 / spacing**2)
        self.interactions = nn.ModuleList(
            InteractionBlock(config.width, config.rbf_bins, config.filters, config.radius)
            for _ in range(config.layers)
        )

    def nodes(self, batch: CrystalBatch) -> Tensor:
        edges = Edges.of(batch)
        x = self.embed_node(batch.node_numbers)
        features = self.rbf(batch.distances)
        fade = 0.5 * (torch.cos(batch.distances * (math.pi / self.radius)) + 1)
        block: Any
        for block in self.interactions:
            conv = block.conv
            filters = _perceptron(conv.nn, features) * fade[:, None]
            messages = gather_source(conv.lin1(x), edges) * edges.from_row(filters)
            x = x + _perceptron((conv.lin2, block.act, block.lin), segment_sum(messages, edges))
        return x


def _perceptron(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """x through all layers. The results are fp32 or wider, since a shifted softplus takes a
    difference that few digits of bf16 are left of."""
    for layer in layers:
        x = full_precision(layer(x))
    return x
