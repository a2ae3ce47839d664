"""Equiformer: attention over messages of scalars, vectors and tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.models.encoders.base import ENCODERS, Encoder, check_positive
from crysforge.models.layers.basic import OneHotLinear
from crysforge.models.layers.irreps import (
    Features,
    IrrepLinear,
    IrrepNorm,
    flatten,
    gate,
    gated_channels,
    unflatten,
    unit_moment,
)
from crysforge.models.layers.spherical import spherical_harmonics
from crysforge.models.layers.tensor_product import Couplings, SeparableProduct
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.keyed_random import keyed_dropout, member_keys
from crysforge.models.ops.precision import full_precision
from crysforge.models.ops.segments import (
    gather_source,
    gather_target,
    segment_softmax,
    segment_sum,
)

DROPOUT_SALT = 0x455155
"""Salt of the first layer's dropout; the next layers count up."""


@dataclass(kw_only=True)
class EquiformerConfig:
    """Settings of Equiformer; the defaults are the published ones for QM9.

    A list has a number of channels for each degree: scalars, vectors, tensors, …
    """

    channels: list[int] = field(default_factory=lambda: [128, 64, 32])
    """Channels of nodes."""
    head_channels: list[int] = field(default_factory=lambda: [32, 16, 8])
    """Channels of each head."""
    hidden_channels: list[int] = field(default_factory=lambda: [384, 192, 96])
    """Channels inside the feed-forward networks."""
    heads: int = 4
    layers: int = 6
    width: int = 512
    """Channels of the result, all scalars."""
    rbf_bins: int = 128
    """Gaussians on the distance, with learned centres and widths."""
    radial: int = 64
    """Channels inside the networks that turn a distance into weights."""
    node_inputs: int = 119
    """One-hot inputs: the mask token and the atomic numbers below this."""
    radius: float = 5.0
    """Å within which atoms are neighbours."""
    mean_degree: float = 34.0
    """Neighbours of a usual atom (34 within 5 Å in the Materials Project); the first sum over
    neighbours is divided by its root."""
    dropout: float = 0.2
    """Dropout of attention weights."""

    def __post_init__(self) -> None:
        check_positive(
            self, "equiformer", "heads", "layers", "width", "rbf_bins", "radial", "node_inputs"
        )
        lists = ("channels", "head_channels", "hidden_channels")
        for name in lists:
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(
                    f"equiformer {name} must be at least 1 each, got {getattr(self, name)}"
                )
        if len({len(getattr(self, name)) for name in lists}) > 1:
            raise ValueError(f"equiformer {', '.join(lists)} must have equally many degrees")
        if not self.mean_degree > 0:
            raise ValueError(f"equiformer mean_degree must be positive, got {self.mean_degree}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"equiformer dropout must be in [0, 1), got {self.dropout}")


@ENCODERS.register("equiformer")
class Equiformer(Encoder):
    """Equiformer (Liao and Smidt, ICLR 2023) without its readout; 3,115,426 parameters by default.

    Invariant to proper rotation, translation and the choice of cell, supercells too; not to
    reflection. Weights that no latent depends on are left out, see `NeighbourEmbedding` and
    `EquiformerBlock`. The norms are others, see `IrrepNorm`.
    """

    Config = EquiformerConfig
    tiny: ClassVar = {
        "channels": [16, 8, 4],
        "head_channels": [8, 4, 2],
        "hidden_channels": [16, 8, 4],
        "heads": 2,
        "layers": 2,
        "width": 16,
        "rbf_bins": 16,
        "radial": 8,
        "radius": 4.0,
    }
    supercell = True

    def __init__(self, config: EquiformerConfig) -> None:
        super().__init__()
        self.dim = config.width
        self.degrees = len(config.channels)
        self.graph = GraphSpec(radius=config.radius, vectors=True)
        self.embed_node = OneHotLinear(config.node_inputs, config.channels[0])
        nn.init.normal_(self.embed_node.weight)
        nn.init.zeros_(self.embed_node.bias)
        self.rbf = LearnedGaussians(config.rbf_bins, config.radius)
        self.embed_edges = NeighbourEmbedding(config)
        self.couplings = Couplings(self.degrees)
        last = [config.width]
        self.blocks = nn.ModuleList(
            EquiformerBlock(
                config, last if i == config.layers - 1 else config.channels, DROPOUT_SALT + i
            )
            for i in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def nodes(self, batch: CrystalBatch) -> Tensor:
        assert batch.edge_vector is not None
        edges = Edges.of(batch)
        harmonics = spherical_harmonics(F.normalize(batch.edge_vector, dim=1), self.degrees)
        matrices = self.couplings(harmonics)
        rbf = self.rbf(batch.distances)
        keys = member_keys(batch.node_rng_key, edges.target, edges.ptr)
        x = self.embed_edges(rbf, harmonics, edges)
        x[0] = x[0] + self.embed_node(batch.node_numbers)[:, None]
        for block in self.blocks:
            x = block(x, rbf, matrices, edges, keys)
        return self.norm(x[0][:, 0])


class LearnedGaussians(nn.Module):
    """Normal densities of the distance in units of the radius, with learned means and standard
    deviations."""

    def __init__(self, bins: int, radius: float) -> None:
        super().__init__()
        self.radius = radius
        self.mean = nn.Parameter(torch.rand(bins))
        self.std = nn.Parameter(torch.empty(bins).uniform_(1 / bins, 1))
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, distance: Tensor) -> Tensor:
        """[n] in Å → [n, bins]."""
        x = self.scale * (distance[:, None] / self.radius) + self.shift
        std = self.std.abs() + 1e-5
        return torch.exp(-0.5 * ((x - self.mean) / std) ** 2) / (math.sqrt(2 * math.pi) * std)


def radial_network(bins: int, hidden: int, out: int) -> nn.Sequential:
    """From radial functions [n, bins] to weights [n, out]."""
    first, second = nn.Linear(bins, hidden), nn.Linear(hidden, hidden)
    for layer in (first, second):
        nn.init.zeros_(layer.bias)
    norms = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
    return nn.Sequential(
        first, norms[0], nn.SiLU(), second, norms[1], nn.SiLU(), nn.Linear(hidden, out)
    )


class NeighbourEmbedding(nn.Module):
    """Features of a node from where its neighbours are, whatever they are.

    As published, a depthwise product of constant scalars with the harmonics and a linear layer. The
    published product has weights for vectors and tensors too, which are zero here.
    """

    def __init__(self, config: EquiformerConfig) -> None:
        super().__init__()
        width = config.channels[0]
        self.scale = config.mean_degree**-0.5
        self.constant = nn.Parameter(torch.randn(width))
        self.radial = radial_network(config.rbf_bins, config.radial, width * len(config.channels))
        self.out = IrrepLinear([width] * len(config.channels), config.channels)

    def forward(self, rbf: Tensor, harmonics: Tensor, edges: Edges) -> Features:
        """Features of nodes from radial functions [R, bins] and harmonics [E, degrees²]."""
        weights = self.radial(rbf).unflatten(1, (len(self.out.layers), -1)) * self.constant
        x = []
        for l, row in enumerate(self.out(list(weights.unbind(1)))):
            y = math.sqrt(2 * l + 1) * harmonics[:, l**2 : (l + 1) ** 2, None]
            messages = (full_precision(edges.from_row(row))[:, None] * y).flatten(1)
            x.append(self.scale * segment_sum(messages, edges).unflatten(1, (2 * l + 1, -1)))
        return x


class EquiformerBlock(nn.Module):
    """A layer of Equiformer: attention and a feed-forward network, each with a norm before it and
    added to what it saw. Where degrees end here, only the lower ones are computed."""

    def __init__(self, config: EquiformerConfig, outputs: Sequence[int], salt: int) -> None:
        super().__init__()
        inputs, hidden = config.channels, config.hidden_channels
        kept = inputs[: len(outputs)]
        self.norm_attention, self.norm_feed = IrrepNorm(inputs), IrrepNorm(kept)
        self.attention = GraphAttention(config, len(outputs), salt)
        self.feed_in = IrrepLinear(kept, gated_channels(hidden[: len(outputs)]))
        self.feed_out = IrrepLinear(hidden[: len(outputs)], outputs)
        self.skip = None if kept == outputs else IrrepLinear(kept, outputs)

    def forward(
        self, x: Features, rbf: Tensor, matrices: Sequence[Tensor], edges: Edges, keys: Tensor
    ) -> Features:
        """Features of nodes; `rbf` [R, bins], `matrices` as of `Couplings`, `keys` [E]."""
        update = self.attention(self.norm_attention(x), rbf, matrices, edges, keys)
        x = [a + b for a, b in zip(x, update, strict=False)]
        update = self.feed_out(gate(self.feed_in(self.norm_feed(x))))
        if self.skip is not None:
            x = self.skip(x)
        return [full_precision(a + b) for a, b in zip(x, update, strict=True)]


class GraphAttention(nn.Module):
    """Equivariant graph attention: a message of both ends and the harmonics between them, a score
    for each head by an MLP, a softmax over neighbours, and values that passed a gate and a second
    product with the harmonics."""

    def __init__(self, config: EquiformerConfig, outputs: int, salt: int) -> None:
        super().__init__()
        channels, heads = config.channels, config.heads
        self.channels, self.heads = channels, heads
        self.dropout, self.salt = config.dropout, salt
        self.head_channels = config.head_channels[:outputs]
        values = [heads * c for c in self.head_channels]
        self.source = IrrepLinear(channels, channels)
        self.target = IrrepLinear(channels, channels, bias=False)
        score = heads * config.head_channels[0]
        scalars, *others = gated_channels(channels)
        self.message = SeparableProduct(channels, [score + scalars, *others])
        self.radial = radial_network(config.rbf_bins, config.radial, self.message.numel)
        self.score = nn.Parameter(torch.empty(heads, config.head_channels[0]))
        nn.init.xavier_uniform_(self.score)
        self.value = SeparableProduct(channels, values)
        self.value_weight = nn.Parameter(torch.randn(self.value.numel))
        self.out = IrrepLinear(values, channels[:outputs])

    def forward(
        self, x: Features, rbf: Tensor, matrices: Sequence[Tensor], edges: Edges, keys: Tensor
    ) -> Features:
        """Features of nodes; `rbf` [R, bins], `matrices` as of `Couplings`, `keys` [E]."""
        both = gather_source(flatten(self.source(x)), edges)
        both = both + gather_target(flatten(self.target(x)), edges)
        weight = edges.from_row(self.radial(rbf))
        message = self.message(unflatten(both, self.channels), matrices, weight)

        hidden, message[0] = message[0].tensor_split([self.score.numel()], dim=2)
        hidden = leaky(hidden[:, 0].unflatten(1, self.score.shape))
        attention = segment_softmax((hidden * self.score).sum(2), edges)
        attention = keyed_dropout(attention, keys, self.dropout, self.salt, self.training)

        value = self.value(gate(message), matrices, self.value_weight)
        weighted = [
            (v.unflatten(2, (self.heads, -1)) * attention[:, None, :, None]).flatten(2)
            for v in value
        ]
        total = segment_sum(flatten(weighted), edges)
        return self.out(unflatten(total, [self.heads * c for c in self.head_channels]))


def _leaky(x: Tensor) -> Tensor:
    """A smooth leaky ReLU of slope 0.2."""
    return 0.6 * x + 0.4 * x * (2 * torch.sigmoid(x) - 1)


LEAKY = unit_moment(_leaky)


def leaky(x: Tensor) -> Tensor:
    """The activation of attention scores."""
    return LEAKY * _leaky(x)
