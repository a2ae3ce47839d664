"""What ALIGNN, DimeNet++ and MEGNet compute, written straight from their definitions on the full
graph, with the weights of the encoder they are given: concatenations, all pairs of edges by
comparison, PyG's own message passing, SciPy's functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy.special import eval_legendre, spherical_jn
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.alignn import GatedConv, ScalarEmbedding
from tests.reference_backbones import gaussians, linear, norm, one_hot, summed


def mean(x: Tensor, index: Tensor, size: int) -> Tensor:
    return summed(x, index, size) / summed(torch.ones_like(x), index, size).clamp(min=1)


def followers(batch: CrystalBatch) -> tuple[Tensor, Tensor]:
    """All pairs of an edge into an atom and an edge out of it, the way back too."""
    source, target = batch.edge_index
    return (target[:, None] == source).nonzero().unbind(1)


def alignn(encoder, batch: CrystalBatch) -> Tensor:
    def embed(layer: ScalarEmbedding, values: Tensor, start: float, end: float) -> Tensor:
        bins = layer.rbf.bins
        basis = gaussians(values, start, end, bins, (end - start) / (bins - 1))
        hidden = F.silu(norm(layer.norm_hidden, layer.hidden(basis)))
        return F.silu(norm(layer.norm_out, layer.out(hidden)))

    def conv(layer: GatedConv, x: Tensor, y: Tensor, j: Tensor, i: Tensor):
        m = layer.gate_target(x)[i] + layer.gate_source(x)[j] + layer.gate_edge(y)
        gate = torch.sigmoid(m)
        total = summed(gate, i, len(x)) + 1e-6
        h = layer.own(x) + summed(gate * layer.source(x)[j], i, len(x)) / total
        if layer.norm_edge is not None:
            y = y + F.silu(norm(layer.norm_edge, m))
        return x + F.silu(norm(layer.norm_node, h)), y

    j, i = batch.edge_index
    first, second = followers(batch)
    cosine = F.cosine_similarity(-batch.edge_vector[first], batch.edge_vector[second], dim=1)
    x = F.silu(norm(encoder.norm_node, one_hot(encoder.embed_node, batch.node_numbers)))
    y = embed(encoder.embed_bond, batch.edge_distance, 0, 8)
    z = embed(encoder.embed_angle, cosine, -1, 1)
    for at, layer in enumerate(encoder.on_atoms):
        x, y = conv(layer, x, y, j, i)
        if at < len(encoder.on_bonds):
            y, z = conv(encoder.on_bonds[at], y, z, first, second)
    return x


def dimenet(encoder, batch: CrystalBatch) -> Tensor:
    j, i = batch.edge_index
    d, v = batch.edge_distance, batch.edge_vector
    kj, ji = followers(batch)
    forth = (v[kj] + v[ji]).norm(dim=1) > 1e-3
    kj, ji = kj[forth], ji[forth]
    angle = torch.atan2(torch.linalg.cross(v[ji], v[kj]).norm(dim=1), (v[ji] * v[kj]).sum(1))

    scaled, envelope = d / encoder.radius, encoder.envelope(d / encoder.radius)
    columns = []
    for l in range(encoder.degrees):
        harmonic = math.sqrt((2 * l + 1) / (4 * math.pi)) * eval_legendre(l, angle.cos().numpy())
        for zero in encoder.waves.zeros[l].tolist():
            wave = math.sqrt(2) / abs(spherical_jn(l + 1, zero)) * spherical_jn(l, zero * scaled)
            columns.append((torch.as_tensor(wave) * envelope)[kj] * torch.as_tensor(harmonic))
    sbf, rbf = torch.stack(columns, dim=1).to(d), encoder.rbf(d)

    x = one_hot(encoder.embed_node, batch.node_numbers)
    x = F.silu(linear(encoder.embed_edge, x[i], x[j], encoder.embed_distance(rbf)))
    latents = encoder.outputs[0](x, rbf, i, batch.num_nodes)
    for interaction, output in zip(encoder.interactions, encoder.outputs[1:], strict=True):
        x = interaction(x, rbf, sbf, kj, ji)
        latents = latents + output(x, rbf, i, batch.num_nodes)
    return latents


def megnet(encoder, batch: CrystalBatch) -> Tensor:
    def softplus(x: Tensor) -> Tensor:
        return F.softplus(x) - math.log(2)

    def update(layers: nn.Sequential, x: Tensor) -> Tensor:
        one, two, three = (m for m in layers.modules() if isinstance(m, nn.Linear))
        return three(softplus(two(softplus(one(x)))))

    j, i = batch.edge_index
    owner, size = batch.node_batch, batch.num_crystals
    x = encoder.embed_node(one_hot(encoder.embed_element, batch.node_numbers))
    e = encoder.embed_edge(
        gaussians(batch.edge_distance, 0, encoder.rbf.end, encoder.rbf.bins, 0.25)
    )
    u = encoder.state.expand(size, -1)
    for block in encoder.blocks:
        de, dx, du = block.dense_edge(e), block.dense_node(x), block.dense_state(u)
        weight = torch.cat([block.edge_by_ends.weight, block.edge_by_state.weight], dim=1)
        ends = torch.cat([dx[i], dx[j], de, du[owner[i]]], dim=1)
        hidden = softplus(F.linear(ends, weight, block.edge_by_ends.bias))
        _, two, _, three = block.edge_update
        de = three(softplus(two(hidden)))
        dx = update(block.node_update, torch.cat([mean(de, i, len(x)), dx, du[owner]], dim=1))
        both = [mean(de, owner[i], size), mean(dx, owner, size), du]
        du = update(block.state_update, torch.cat(both, dim=1))
        e, x, u = e + de, x + dx, u + du
    return torch.cat([x, mean(e, i, len(x)), u[owner]], dim=1)


PLAIN = {"alignn": alignn, "dimenet++": dimenet, "megnet": megnet}
