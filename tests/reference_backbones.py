"""What each backbone computes, written straight from its definition on the full graph, with the
weights of the encoder it is given: concatenations over edges, gathers by index, PyTorch's own batch
norm."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn.models.schnet import GaussianSmearing
from torch_geometric.utils import softmax

from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.equiformer import leaky
from crysforge.models.layers.irreps import coupling, gate
from crysforge.models.layers.spherical import spherical_harmonics
from crysforge.models.ops.keyed_random import derive, keyed_dropout
from crysforge.models.ops.norm import BatchNorm


def norm(module: BatchNorm, x: Tensor) -> Tensor:
    if module.training:
        return F.batch_norm(x, None, None, module.weight, module.bias, training=True)
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)


def one_hot(layer: nn.Linear, numbers: Tensor) -> Tensor:
    return F.one_hot(numbers, layer.in_features).to(layer.weight) @ layer.weight.t() + layer.bias


def gaussians(x: Tensor, start: float, end: float, bins: int, width: float) -> Tensor:
    """exp(-(x - c)² / width)."""
    centres = torch.linspace(start, end, bins, dtype=x.dtype)
    return torch.exp(-((x[:, None] - centres) ** 2) / width)


def summed(x: Tensor, index: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, *x.shape[1:]).index_add(0, index, x)


def linear(layer: nn.Linear, *parts: Tensor) -> Tensor:
    return F.linear(torch.cat(parts, dim=1), layer.weight, layer.bias)


def cgcnn(encoder, batch: CrystalBatch) -> Tensor:
    j, i = batch.edge_index
    x = one_hot(encoder.embed_node, batch.node_numbers)
    bins = encoder.rbf.bins
    e = gaussians(batch.edge_distance, 0, 8, bins, (8 / (bins - 1)) ** 2)
    for conv in encoder.convs:
        z = norm(conv.norm_edge, linear(conv.edge, x[i], x[j], e))
        gate, core = z.chunk(2, dim=1)
        h = summed(torch.sigmoid(gate) * F.softplus(core), i, len(x))
        x = F.softplus(x + norm(conv.norm_out, h))
    return x


def cogn(encoder, batch: CrystalBatch) -> Tensor:
    j, i = batch.edge_index
    x = one_hot(encoder.embed_node, batch.node_numbers)
    rbf, layer = encoder.embed_edge
    centres = [8 * (k + 1) / rbf.bins for k in range(rbf.bins)]
    sigma = (8 / rbf.bins) ** 0.5
    away = batch.edge_distance[:, None] - torch.tensor(centres, dtype=x.dtype)
    e = linear(layer, torch.exp(-(away**2) / (2 * sigma**2)))
    for conv in encoder.convs:
        h = F.silu(linear(conv.edge, x[i], x[j], e))
        for hidden in conv.hidden:
            h = F.silu(hidden(h))
        x = x + F.silu(conv.node(summed(h, i, len(x))))
    return x


def gatgnn(encoder, batch: CrystalBatch) -> Tensor:
    j, i = batch.edge_index
    x = one_hot(encoder.embed_node, batch.node_numbers)
    bins = encoder.rbf.bins
    e = gaussians(batch.edge_distance, 0, 8, bins, (8 / (bins - 1)) ** 2)
    e = F.leaky_relu(encoder.embed_edge(e), 0.2)
    for conv, after in zip(encoder.convs, encoder.norms, strict=True):
        weight = torch.cat([conv.node.weight, conv.edge.weight], dim=1)
        both = [F.softplus(torch.cat([x[k], e], 1) @ weight.t()) for k in (i, j)]
        target, source = (y.view(len(i), conv.heads, -1) for y in both)
        att = torch.cat([conv.attention[0], conv.attention[1]], dim=-1)
        alpha = F.softplus((torch.cat([target, source], dim=-1) * att).sum(-1))
        alpha = softmax(F.softplus(norm(conv.norm_score, alpha)), i, num_nodes=len(x))
        out = summed(source * alpha[..., None], i, len(x)).mean(dim=1) + conv.bias
        x = F.softplus(norm(after, out))
    seen = F.one_hot(batch.node_numbers, encoder.inputs).to(x)
    atoms = batch.ptr.diff()[:, None].to(x)
    composition = (summed(seen, batch.batch, batch.num_crystals) / atoms)[batch.batch]
    score = encoder.score(torch.cat([x, composition], dim=1))
    return x * softmax(score, batch.batch) * atoms[batch.batch]


def schnet(encoder, batch: CrystalBatch) -> Tensor:
    x = one_hot(encoder.embed_node, batch.node_numbers)
    distance = batch.edge_distance
    before = torch.get_default_dtype()
    torch.set_default_dtype(distance.dtype)
    smear = GaussianSmearing(0.0, encoder.radius, encoder.rbf.bins)
    torch.set_default_dtype(before)
    for block in encoder.interactions:
        x = x + block(x, batch.edge_index, distance, smear(distance))
    return x


def comformer_conv(conv, x: Tensor, e: Tensor, batch: CrystalBatch) -> Tensor:
    j, i = batch.edge_index
    q, k, v, e = conv.query(x), conv.key(x), conv.value(x), conv.edge(e)
    key = conv.key_out(F.silu(linear(conv.key_hidden, k[i], k[j], e)))
    value = conv.value_out(F.silu(linear(conv.value_hidden, v[i], v[j], e)))
    score = q[i] * key / math.sqrt(x.shape[1])
    h = summed(value * torch.sigmoid(norm(conv.norm_score, score)), i, len(x))
    return F.softplus(x + norm(conv.norm_out, conv.out(h)))


def ecomformer(encoder, batch: CrystalBatch) -> Tensor:
    j, i = batch.edge_index
    x = one_hot(encoder.embed_node, batch.node_numbers)
    e = encoder.embed_length(-0.75 / batch.edge_distance)
    x = comformer_conv(encoder.convs[0], x, e, batch)
    layer, s, t = encoder.update, encoder.update.scalars, encoder.update.tensors
    r = F.normalize(batch.edge_vector, dim=1)
    outer = (r[:, :, None] * r[:, None] - torch.eye(3).to(r) / 3) * math.sqrt(1.5)
    y = r.new_ones(len(r), 1), r, outer.flatten(1)  # squares add up to 1; a tensor is a matrix here
    edges = x.new_ones(len(i))
    degree = summed(edges, i, len(x)).clamp(min=1)[:, None, None]

    weights = layer.weigh_first(F.softplus(layer.hidden_first(e))).view(-1, s, s + 2 * t)
    scalars = layer.down(x)
    message = torch.einsum("ev,evu->eu", scalars[j], weights) / math.sqrt(s)
    z = [
        summed(math.sqrt(2 * k + 1) * m[:, :, None] * y[k][:, None], i, len(x)) / degree
        for k, m in enumerate(message.split([s, t, t], dim=1))
    ]
    z[0] = z[0] + scalars[:, :, None]

    weights = layer.weigh_second(F.softplus(layer.hidden_second(e))).view(-1, s, s + 2 * t)
    products = torch.cat([(z[k][j] * y[k][:, None]).sum(2) for k in range(3)], dim=1)
    message = torch.einsum("ev,euv->eu", products, weights) / math.sqrt(s + 2 * t)
    h = norm(layer.norm, summed(message, i, len(x)) / degree[:, :, 0])
    x = F.softplus(layer.out(F.softplus(h))) + layer.skip(x)
    for conv in encoder.convs[1:]:
        x = comformer_conv(conv, x, e, batch)
    return x


def icomformer(encoder, batch: CrystalBatch) -> Tensor:
    i = batch.edge_index[1]
    x = one_hot(encoder.embed_node, batch.node_numbers)
    e = encoder.embed_length(-0.75 / batch.edge_distance)
    x = comformer_conv(encoder.convs[0], x, e, batch)
    layer, width = encoder.update_edges, e.shape[1]
    q, key_0, value_0 = layer.query(e), layer.key(e), layer.value(e)
    scores, values = [], []
    for k in range(3):
        axis = batch.lattice_triple[batch.batch[i], k]
        f = encoder.embed_length(-0.75 / axis.norm(dim=1))
        cosine = F.cosine_similarity(axis, batch.edge_vector, dim=1)
        angle = layer.angle(encoder.embed_cosine(cosine.clamp(-1, 1)))
        key = linear(layer.key_hidden, key_0, layer.partner_key(f).chunk(3, dim=1)[k], angle)
        value = linear(
            layer.value_hidden, value_0, layer.partner_value(f).chunk(3, dim=1)[k], angle
        )
        scores.append(q * layer.key_out(F.silu(key)) / math.sqrt(width))
        values.append(layer.value_out(F.silu(value)))
    gates = torch.sigmoid(norm(layer.norm_score, torch.cat(scores))).chunk(3)
    update = sum(layer.out(v * g) for v, g in zip(values, gates, strict=True))
    e = F.softplus(e + norm(layer.norm_out, update))
    for conv in encoder.convs[1:]:
        x = comformer_conv(conv, x, e, batch)
    return x


def potnet(encoder, batch: CrystalBatch) -> Tensor:
    j, i = batch.edge_index
    x = one_hot(encoder.embed_node, batch.node_numbers)
    distance, value = batch.edge_distance, batch.pair_sums[batch.edge_distance_row]
    local = distance.isfinite()
    bins, sum_bins = encoder.embed_length[0].bins, encoder.embed_sum[0].bins
    near = gaussians(-0.75 / distance[local], -4, 4, bins, (8 / (bins - 1)) ** 2)
    centres = torch.linspace(-4, 4, sum_bins, dtype=value.dtype)
    far = torch.sqrt(1 + ((value[~local, None] - centres) * (sum_bins - 1) / 8) ** 2)
    e = x.new_empty(len(i), x.shape[1])
    e[local] = F.silu(linear(encoder.embed_length[1], near))
    e[~local] = norm(encoder.norm_sum, F.softplus(linear(encoder.embed_sum[1], far)))
    for conv in encoder.convs:
        score = conv.score_out(F.silu(linear(conv.score_hidden, x[i], x[j], e)))
        message = conv.value_out(F.silu(linear(conv.value_hidden, x[i], x[j], e)))
        h = summed(torch.sigmoid(norm(conv.norm_score, score)) * message, i, len(x))
        x = F.relu(x + norm(conv.norm_out, h))
    return x


def irrep_linear(layer, x: list[Tensor]) -> list[Tensor]:
    return [f(part) for f, part in zip(layer.layers, x, strict=False)]


def irrep_norm(layer, x: list[Tensor]) -> list[Tensor]:
    size = torch.sqrt(sum((part**2).mean(dim=(1, 2)) for part in x) / len(x) + layer.eps)
    others = (part / size[:, None, None] * s for part, s in zip(x[1:], layer.scales, strict=True))
    return [layer.scalars(x[0]), *others]


def separable(layer, x: list[Tensor], y: list[Tensor], weight: Tensor) -> list[Tensor]:
    """One path after another: coefficients, features, harmonics."""
    weight, out = weight.expand(len(y[0]), -1), []
    for c in range(layer.outputs):
        paths = []
        for a, part in enumerate(x):
            for b in range(abs(a - c), min(a + c, len(y) - 1) + 1):
                scale = math.sqrt((2 * c + 1) * (2 * b + 1))
                coefficients = scale * torch.from_numpy(coupling(a, b, c)).to(part)
                z = torch.einsum("abc,eau,eb->ecu", coefficients, part, y[b])
                w, weight = weight.tensor_split([z.shape[2]], dim=1)
                paths.append(z * w[:, None])
        out.append(layer.linear.layers[c](torch.cat(paths, dim=2)))
    return out


def equiformer(encoder, batch: CrystalBatch) -> Tensor:
    j, i = batch.edge_index
    n, degrees = batch.num_nodes, encoder.degrees
    flat = spherical_harmonics(F.normalize(batch.edge_vector, dim=1), degrees)
    y = list(flat.split([2 * l + 1 for l in range(degrees)], dim=1))
    rbf = encoder.rbf(batch.edge_distance)
    first = encoder.embed_edges
    weights = first.radial(rbf).chunk(degrees, dim=1)
    x = irrep_linear(first.out, [(w * first.constant)[:, None] for w in weights])
    x = [math.sqrt(2 * l + 1) * part * y[l][:, :, None] for l, part in enumerate(x)]
    x = [summed(part, i, n) * first.scale for part in x]
    x[0] = x[0] + one_hot(encoder.embed_node, batch.node_numbers)[:, None]
    number = torch.cat([torch.arange(int(size)) for size in batch.edge_ptr.diff()])
    for block in encoder.blocks:
        layer = block.attention
        h = irrep_norm(block.norm_attention, x)
        h = zip(irrep_linear(layer.source, h), irrep_linear(layer.target, h), strict=True)
        message = separable(layer.message, [s[j] + t[i] for s, t in h], y, layer.radial(rbf))
        score, message[0] = message[0].tensor_split([layer.score.numel()], dim=2)
        score = leaky(score.view(len(j), *layer.score.shape))
        attention = softmax((score * layer.score).sum(2), i, num_nodes=n)
        keys = derive(batch.node_rng_key[i], number)
        attention = keyed_dropout(attention, keys, layer.dropout, layer.salt, layer.training)
        value = separable(layer.value, gate(message), y, layer.value_weight)
        value = [v.unflatten(2, (layer.heads, -1)) * attention[:, None, :, None] for v in value]
        update = irrep_linear(layer.out, [summed(v.flatten(2), i, n) for v in value])
        x = [a + b for a, b in zip(x, update, strict=False)]
        h = irrep_linear(block.feed_in, irrep_norm(block.norm_feed, x))
        update = irrep_linear(block.feed_out, gate(h))
        x = x if block.skip is None else irrep_linear(block.skip, x)
        x = [a + b for a, b in zip(x, update, strict=True)]
    return encoder.norm(x[0][:, 0])


PLAIN = {
    "cgcnn": cgcnn,
    "cogn": cogn,
    "gatgnn": gatgnn,
    "ecomformer": ecomformer,
    "equiformer": equiformer,
    "icomformer": icomformer,
    "potnet": potnet,
    "schnet": schnet,
}
