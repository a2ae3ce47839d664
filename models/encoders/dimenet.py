"""DimeNet++: messages between edges that know the angle they meet at, from PyG's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn.models.dimenet import (
    BesselBasisLayer,
    Envelope,
    InteractionPPBlock,
    OutputPPBlock,
)

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, check_positive
from crysforge.models.layers.angle_sums import Turns
from crysforge.models.layers.basic import EdgeLinear, OneHotLinear
from crysforge.models.layers.spherical import SphericalBessel
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.precision import full_precision
from crysforge.models.ops.segments import segment_sum


@dataclass(kw_only=True)
class DimeNetConfig:
    """Settings of DimeNet++; the defaults are PyG's."""

    width: int = 128
    """Channels of edges, and of the latents."""
    interaction_width: int = 64
    """Channels in which edges meet at an angle."""
    basis_width: int = 8
    """Channels between a basis and its filters."""
    output_width: int = 256
    """Channels of nodes in an output block."""
    layers: int = 4
    """Interaction blocks; the output blocks are one more."""
    degrees: int = 7
    """Spherical harmonics of the angle."""
    roots: int = 6
    """Bessel functions of the distance, for each harmonic too."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    radius: float = 5.0
    """Å within which atoms are neighbours; messages fade to zero there."""

    def __post_init__(self) -> None:
        widths = ("width", "interaction_width", "basis_width", "output_width")
        check_positive(self, "dimenet++", *widths, "layers", "degrees", "roots", "node_inputs")


@ENCODERS.register("dimenet++")
class DimeNet(Encoder):
    """DimeNet++ (Gasteiger et al., arXiv:2011.14115), with a latent for every atom instead of its
    share of a property; 2,051,590 parameters by default.

    Weights and layers are those of `torch_geometric.nn.DimeNetPlusPlus` with `width` outputs. Its
    message passing is done here, with periodic edges, and without a list of angles (`Turns`): time
    and memory go with the number of edges, however many neighbours an atom has. Invariant to
    rotation, reflection, translation and the choice of cell, supercells too.
    """

    Config = DimeNetConfig
    tiny: ClassVar = {
        "width": 16,
        "interaction_width": 8,
        "basis_width": 4,
        "output_width": 16,
        "layers": 2,
        "degrees": 3,
        "roots": 3,
        "radius": 4.0,
    }
    supercell = True

    def __init__(self, config: DimeNetConfig) -> None:
        super().__init__()
        width, degrees, roots = config.width, config.degrees, config.roots
        self.dim, self.radius, self.degrees = width, config.radius, degrees
        self.graph = GraphSpec(radius=config.radius, vectors=True)
        self.rbf = BesselBasisLayer(roots, config.radius)
        self.waves = SphericalBessel(degrees, roots)
        self.envelope = Envelope(5)
        act = nn.SiLU()
        self.embed_node = OneHotLinear(config.node_inputs, width)
        nn.init.uniform_(self.embed_node.weight, -(3**0.5), 3**0.5)
        self.embed_distance = nn.Sequential(nn.Linear(roots, width), act)
        self.embed_edge = EdgeLinear(width, width, width)
        self.interactions = nn.ModuleList(
            InteractionPPBlock(
                width,
                config.interaction_width,
                config.basis_width,
                degrees,
                roots,
                num_before_skip=1,
                num_after_skip=2,
                act=act,
            )
            for _ in range(config.layers)
        )
        self.outputs = nn.ModuleList(
            OutputPPBlock(
                roots,
                width,
                config.output_width,
                width,
                num_layers=3,
                act=act,
                output_initializer="glorot_orthogonal",  # latents that are zero teach nothing
            )
            for _ in range(config.layers + 1)
        )

    def nodes(self, batch: CrystalBatch) -> Tensor:
        assert batch.edge_vector is not None
        edges = Edges.of(batch)
        turns = Turns.of(edges, batch.edge_vector, self.degrees)
        rbf, sbf = self.rbf(batch.distances), self._waves_by_degree(batch.distances)
        x = self.embed_node(batch.node_numbers)
        x = F.silu(self.embed_edge(x, self.embed_distance(rbf), edges))
        latents = _output(self.outputs[0], x, rbf, edges)
        for interaction, output in zip(self.interactions, self.outputs[1:], strict=True):
            x = _interact(interaction, x, rbf, sbf, edges, turns)
            latents = latents + _output(output, x, rbf, edges)
        return latents

    def _waves_by_degree(self, distances: Tensor) -> Tensor:
        """[R, L, L·roots]: the radial half of the spherical basis. Row l has the waves of degree l
        in the columns of degree l and zeros in the others, so that a linear layer without bias on
        the basis can be applied to each degree alone."""
        scaled = distances / self.radius
        degree = torch.arange(self.degrees, device=scaled.device)
        norm = ((2 * degree + 1) / (4 * torch.pi)).sqrt()  # of a harmonic that is not a Legendre's
        waves = self.waves(scaled) * self.envelope(scaled)[:, None, None] * norm[:, None]
        return torch.einsum("rln,lk->rlkn", waves, torch.eye(self.degrees).to(waves)).flatten(2)


def _interact(
    block: Any, x: Tensor, rbf: Tensor, sbf: Tensor, edges: Edges, turns: Turns
) -> Tensor:
    """PyG's `InteractionPPBlock`: new features of edges, [E, width]."""
    radial = edges.from_row(block.lin_rbf2(block.lin_rbf1(rbf)))
    down = block.act(block.lin_down(block.act(block.lin_kj(x)) * radial))
    filters = block.lin_sbf2(block.lin_sbf1(sbf))  # [R, L, interaction_width]
    filters = edges.from_row(filters.flatten(1)).unflatten(1, filters.shape[1:])
    met = turns(full_precision(filters * down[:, None]))
    h = block.act(block.lin_ji(x)) + block.act(block.lin_up(met))
    for layer in block.layers_before_skip:
        h = layer(h)
    h = block.act(block.lin(h)) + x
    for layer in block.layers_after_skip:
        h = layer(h)
    return h


def _output(block: Any, x: Tensor, rbf: Tensor, edges: Edges) -> Tensor:
    """PyG's `OutputPPBlock`: its part of the latents of nodes, [N, width]."""
    messages = edges.from_row(block.lin_rbf(rbf)) * x
    h = block.lin_up(segment_sum(full_precision(messages), edges))
    for layer in block.lins:
        h = block.act(layer(h))
    return block.lin(h)
