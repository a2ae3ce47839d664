"""Encoders written straight from their definitions, slow and plain: full graphs, concatenations
over edges, PyTorch's own layers. Their state dicts are those of the encoders they define."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.ops.keyed_random import keyed_dropout


def aggregate(messages: Tensor, batch: CrystalBatch) -> Tensor:
    """Sum over the edges into each atom."""
    out = messages.new_zeros(batch.num_nodes, *messages.shape[1:])
    return out.index_add(0, batch.edge_index[1], messages)


def gaussians(x: Tensor, start: float, end: float, bins: int) -> Tensor:
    spacing = (end - start) / (bins - 1)
    centres = torch.tensor([start + i * spacing for i in range(bins)], dtype=x.dtype)
    return torch.exp(-((x[:, None] - centres) ** 2) / spacing)


class ReferencePDDFormer(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.embed_node = nn.Linear(config.node_inputs, d)
        self.embed_edge = nn.Sequential(nn.Identity(), nn.Linear(config.rbf_bins, d), nn.Softplus())
        self.embed_pdd = nn.Linear(config.pdd + 1, d)
        self.convs = nn.ModuleList(ReferenceComformerConv(d) for _ in range(config.layers))
        self.gates = nn.ModuleList(
            ReferenceZeoConv(d, config.dropout) for _ in range(config.layers - 1)
        )

    def forward(self, batch: CrystalBatch) -> Tensor:
        one_hot = F.one_hot(batch.node_numbers, self.config.node_inputs)
        x = self.embed_node(one_hot.to(self.embed_node.weight.dtype))
        scalar = torch.clamp(-0.75 / batch.edge_distance, min=-4.0)
        edge = self.embed_edge(gaussians(scalar, -4.0, 0.0, self.config.rbf_bins))
        state = self.embed_pdd(batch.pdd)
        for i, conv in enumerate(self.convs):
            x = conv(x, edge, batch)
            if i < len(self.gates):
                x, state = self.gates[i](x, state, batch, salt=0x5A454F + i)
        return x


class ReferenceComformerConv(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        for name in ("query", "key", "value", "edge", "out", "key_out", "value_out"):
            setattr(self, name, nn.Linear(d, d))
        for name in ("key_hidden", "value_hidden"):
            setattr(self, name, nn.Linear(3 * d, d))
        self.norm_score = nn.BatchNorm1d(d)
        self.norm_out = nn.BatchNorm1d(d)

    def forward(self, x: Tensor, edge: Tensor, batch: CrystalBatch) -> Tensor:
        j, i = batch.edge_index
        q, k, v, e = self.query(x), self.key(x), self.value(x), self.edge(edge)
        key = self.key_out(F.silu(self.key_hidden(torch.cat([k[i], k[j], e], dim=1))))
        score = q[i] * key / math.sqrt(x.shape[1])
        gate = torch.sigmoid(self.norm_score(score))
        value = self.value_out(F.silu(self.value_hidden(torch.cat([v[i], v[j], e], dim=1))))
        return F.softplus(x + self.norm_out(self.out(aggregate(value * gate, batch))))


class ReferenceZeoConv(nn.Module):
    def __init__(self, d: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.BatchNorm1d(d)
        self.split = nn.Linear(d, 2 * d)
        self.mix = nn.Linear(d, d)
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor, state: Tensor, batch: CrystalBatch, salt: int):
        state = state + x
        u1, u2 = self.split(self.norm(state)).chunk(2, dim=1)
        u2 = keyed_dropout(F.gelu(u2), batch.node_rng_key, self.dropout, salt, self.training)
        return self.out(self.mix(u1) * u2) + x, state


class ReferenceMatformer(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.embed_node = nn.Linear(config.node_inputs, d)
        self.embed_edge = nn.Sequential(
            nn.Identity(), nn.Linear(config.rbf_bins, d), nn.Softplus(), nn.Linear(d, d)
        )
        self.convs = nn.ModuleList(
            ReferenceMatformerConv(d, config.heads) for _ in range(config.layers)
        )

    def forward(self, batch: CrystalBatch) -> Tensor:
        one_hot = F.one_hot(batch.node_numbers, self.config.node_inputs)
        x = self.embed_node(one_hot.to(self.embed_node.weight.dtype))
        edge = self.embed_edge(gaussians(batch.edge_distance, 0.0, 8.0, self.config.rbf_bins))
        for conv in self.convs:
            x = conv(x, edge, batch)
        return x


class ReferenceMatformerConv(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(d, heads * d))
        self.edge = nn.Linear(d, heads * d, bias=False)
        self.update = nn.Linear(3 * d, 3 * d)
        self.norm_gate = nn.LayerNorm(3 * d)
        self.message = nn.Linear(3 * d, d)
        self.norm_message = nn.LayerNorm(d)
        self.out = nn.Linear(heads * d, d)
        self.skip = nn.Linear(d, d)
        self.norm = nn.BatchNorm1d(d)

    def forward(self, x: Tensor, edge: Tensor, batch: CrystalBatch) -> Tensor:
        j, i = batch.edge_index
        d = x.shape[1]
        q, k, v = (f(x).view(-1, self.heads, d) for f in (self.query, self.key, self.value))
        e = self.edge(edge).view(-1, self.heads, d)
        score = torch.cat([q[i]] * 3, dim=-1) * torch.cat([k[i], k[j], e], dim=-1)
        gate = torch.sigmoid(self.norm_gate(score / math.sqrt(3 * d)))
        update = self.update(torch.cat([v[i], v[j], e], dim=-1)) * gate
        message = self.norm_message(self.message(update))
        out = self.out(aggregate(message, batch).flatten(1))
        return F.silu(self.norm(out)) + self.skip(x)


REFERENCES = {"pddformer": ReferencePDDFormer, "matformer": ReferenceMatformer}


def reference(encoder: nn.Module, name: str, config) -> nn.Module:
    """The plain definition with a copy of the encoder's parameters, in the encoder's precision."""
    out = REFERENCES[name](config).to(next(encoder.parameters()).dtype)
    out.load_state_dict(encoder.state_dict())
    return out.train(encoder.training)
