"""Messages of attention layers as one function each: gather, message, gate, segment sum.

GPUs take the Triton twins in `models.kernels`. The definitions here are written for CPU: one
`autograd.Function` that walks blocks of edges whose buffers stay in the cache, keeps only what a
matrix product made and recomputes the rest in the backward pass.

No concatenation over edges: a weight on [x_target; x_source; feature] is applied to nodes and to
distinct features beforehand, and an edge adds up three rows (`ops.gather_sum`).

Letters in shapes: N nodes, E edges, R rows of the edge features, D channels, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.models.ops.dispatch import Op
from crysforge.models.ops.edges import EdgeBlock, Edges
from crysforge.models.ops.norm import BatchNorm, moments
from crysforge.models.ops.precision import full_precision

_BLOCK = 1 << 19
"""Elements of a block's largest buffer on CPU: 2 MB in fp32."""

silu_backward = torch.ops.aten.silu_backward
sigmoid_backward = torch.ops.aten.sigmoid_backward
layer_norm_backward = torch.ops.aten.native_layer_norm_backward


@Op
def comformer_messages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_out: nn.Linear,
    value_out: nn.Linear,
    norm: BatchNorm,
    edges: Edges,
) -> Tensor:
    """Summed messages of the ComFormer node layer, [N, D], fp32 or wider.

        key = key_out(silu(gather_sum(keys)));  value = value_out(silu(gather_sum(values)))
        message = value · sigmoid(norm(query_target · key)),  summed with multiplicities

    Args:
        query: [N, D], already divided by sqrt(D).
        keys, values: [2N+R, D] tables, see `ops.gather_sum`.
        norm: over all equal edges of the batch; its running statistics are updated in training.
    """
    return _ComformerMessages.apply(
        query,
        keys,
        values,
        key_out.weight,
        key_out.bias,
        value_out.weight,
        value_out.bias,
        norm.weight,
        norm.bias,
        norm,
        edges,
    )


class _ComformerMessages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, values, wk, bk, wv, bv, gamma, beta, norm, edges):
        blocks = edges.blocks(_BLOCK // query.shape[1])
        with torch.autocast(query.device.type, enabled=False):
            query = full_precision(query)
            weight = edges.weight.to(query.dtype)
            key, value = (t.new_empty(len(edges), t.shape[1]) for t in (keys, values))
            score, parts = query.new_empty(key.shape), []
            for b in blocks:
                for out, table, w, bias in ((key, keys, wk, bk), (value, values, wv, bv)):
                    hidden = F.silu(b.gather(table), inplace=True)
                    torch.addmm(bias.to(hidden), hidden, w.t().to(hidden), out=out[b.edges])
                part = score[b.edges]
                torch.mul(query.index_select(0, b.target), key[b.edges], out=part)
                if norm.training:
                    parts.append(moments(part, weight[b.edges]))
            standard = norm.standard(parts, weight)
            offset = -standard.mean * standard.rstd
            summed = torch.empty_like(query)
            for b in blocks:
                part = score[b.edges]
                torch.addcmul(offset, part, standard.rstd, out=part)
                gate = torch.addcmul(beta, part, gamma).sigmoid_()
                summed[b.nodes] = b.into(gate.mul_(value[b.edges]))
        ctx.save_for_backward(query, keys, values, wk, wv, gamma, beta, key, value)
        ctx.edges, ctx.standard = edges, standard
        return summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, keys, values, wk, wv, gamma, beta, key, value = ctx.saved_tensors
        edges, standard = ctx.edges, ctx.standard
        blocks = edges.blocks(_BLOCK // query.shape[1])
        with torch.autocast(query.device.type, enabled=False):
            score, dgate = (query.new_empty(key.shape) for _ in range(2))  # of the sigmoid's input
            offset = -standard.mean * standard.rstd
            dgamma, dbeta = sums = query.new_zeros(2, len(gamma))
            mlp = _HiddenGrad(values, wv, edges)
            for b in blocks:
                part = torch.mul(query.index_select(0, b.target), key[b.edges], out=score[b.edges])
                torch.addcmul(offset, part, standard.rstd, out=part)
                gate = torch.addcmul(beta, part, gamma).sigmoid_()
                dmessage = b.spread(grad)
                part = torch.mul(dmessage, value[b.edges], out=dgate[b.edges])
                sigmoid_backward(part, gate, grad_input=part)
                dbeta += part.sum(0)
                dgamma += (part * score[b.edges]).sum(0)
                mlp.add(b, dmessage.mul_(gate))
            dvalues, dwv, dbv = mlp.result()

            # The score's mean and variance depend on all scores: two more terms.
            scale = standard.rstd * gamma
            by_score, constant = -standard.sum_over_ranks(sums.clone()) * scale
            dquery = torch.empty_like(query)
            mlp = _HiddenGrad(keys, wk, edges)
            for b in blocks:
                dscore = torch.addcmul(constant, score[b.edges], by_score)
                dscore.mul_(standard.share[b.edges, None]).addcmul_(dgate[b.edges], scale)
                dquery[b.nodes] = b.total(dscore * key[b.edges])
                mlp.add(b, dscore.mul_(query.index_select(0, b.target)))
            dkeys, dwk, dbk = mlp.result()
        return dquery, dkeys, dvalues, dwk, dbk, dwv, dbv, dgamma, dbeta, None, None


class _HiddenGrad:
    """Backward of `silu(gather_sum(table)) @ weight.t() + bias`, block by block."""

    def __init__(self, table, weight, edges: Edges) -> None:
        self.table, self.weight, self.edges = table, weight.to(table.dtype), edges
        self.hidden = table.new_empty(len(edges), table.shape[1])
        self.dweight = torch.zeros_like(full_precision(weight))
        self.dbias = self.dweight.new_zeros(len(weight))

    def add(self, block: EdgeBlock, grad: Tensor) -> None:
        """`grad` [e, D] of the block's output."""
        self.dbias += grad.sum(0)
        grad = grad.to(self.table.dtype)
        hidden = block.gather(self.table)
        if grad.dtype == self.dweight.dtype:
            self.dweight.addmm_(grad.t(), F.silu(hidden))
        else:
            self.dweight += grad.t() @ F.silu(hidden)
        silu_backward(grad @ self.weight, hidden, grad_input=self.hidden[block.edges])

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of table, weight, bias."""
        return self.edges.gather.transpose(self.hidden), self.dweight, self.dbias


@Op
def matformer_messages(
    query: Tensor,
    key: Tensor,
    feature_key: Tensor,
    values: Tensor,
    gate_norm: nn.LayerNorm,
    message: nn.Linear,
    message_norm: nn.LayerNorm,
    edges: Edges,
) -> Tensor:
    """Summed messages of the Matformer layer, [N, H, C], fp32 or wider.

        score = query_target · [key_target; key_source; feature_key]
        message = message_norm(message(gather_sum(values) · sigmoid(gate_norm(score))))

    summed with multiplicities; all parameters are shared by the heads.

    Args:
        query: [N, H, C], already divided by sqrt(3C). key: [N, H, C]. feature_key: [R, H, C].
        values: [2N+R, H·3C] table, see `ops.gather_sum`.
    """
    return _MatformerMessages.apply(
        query,
        key,
        feature_key,
        values,
        gate_norm.weight,
        gate_norm.bias,
        message.weight,
        message.bias,
        message_norm.weight,
        message_norm.bias,
        gate_norm.eps,
        edges,
    )


class _MatformerMessages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, feature, values, wg, bg, wm, bm, wn, bn, eps, edges):
        _, heads, width = query.shape
        ctx.heads, ctx.eps, ctx.edges = heads, eps, edges
        with torch.autocast(query.device.type, enabled=False):
            query, key, feature = (full_precision(x.flatten(1)) for x in (query, key, feature))
            wg, bg, wn, bn = (p.to(query) for p in (wg, bg, wn, bn))
            product = values.new_empty(len(edges) * heads, width)
            summed = torch.empty_like(query)
            own = query * key
            for b in edges.blocks(_BLOCK // values.shape[1]):
                *_, score = _scores(query, key, feature, own, edges, b, heads)
                gate = F.layer_norm(score, score.shape[-1:], wg, bg, eps).sigmoid_()
                update = gate.mul_(b.gather(values).view_as(gate)).flatten(0, 1).to(values)
                rows = product[b.edges.start * heads : b.edges.stop * heads]
                torch.addmm(bm.to(update), update, wm.t().to(update), out=rows)
                messages = F.layer_norm(rows.to(query), (width,), wn, bn, eps)
                summed[b.nodes] = b.into(messages.view(-1, heads * width))
        ctx.save_for_backward(query, key, feature, values, wg, bg, wm, wn, bn, product)
        return summed.view(-1, heads, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, feature, values, wg, bg, wm, wn, bn, product = ctx.saved_tensors
        edges, heads, eps = ctx.edges, ctx.heads, ctx.eps
        width = product.shape[1]
        grad = grad.flatten(1)
        own = query * key
        dquery, down = torch.empty_like(query), torch.empty_like(query)
        dkey, dfeature = (query.new_empty(len(edges), query.shape[1]) for _ in range(2))
        dvalues = values.new_empty(len(edges), values.shape[1])
        dparameters = [torch.zeros_like(full_precision(p)) for p in (wg, bg, wm, wn, wn, bn)]
        dwg, dbg, dwm, dbm, dwn, dbn = dparameters
        with torch.autocast(query.device.type, enabled=False):
            for b in edges.blocks(_BLOCK // values.shape[1]):
                q, k, f, score = _scores(query, key, feature, own, edges, b, heads)
                normed, mean, rstd = torch.native_layer_norm(score, score.shape[-1:], wg, bg, eps)
                gate = normed.sigmoid_()
                update = b.gather(values).view_as(gate).to(gate)

                rows = product[b.edges.start * heads : b.edges.stop * heads].to(query)
                dmessage = b.spread(grad).view(-1, width)
                drows, *dnorm = _layer_norm_backward(dmessage, rows, wn, bn, eps)
                dwn += dnorm[0]
                dbn += dnorm[1]
                dbm += drows.sum(0)
                drows = drows.to(values)
                dwm += drows.t() @ (update * gate).flatten(0, 1).to(values)
                dproduct = (drows @ wm.to(values)).view_as(gate).to(gate)
                torch.mul(dproduct, gate, out=dvalues[b.edges].view_as(gate))
                dgate = sigmoid_backward(dproduct.mul_(update), gate)
                dscore, *dnorm = layer_norm_backward(
                    dgate, score, score.shape[-1:], mean, rstd, wg, bg, [True] * 3
                )
                dwg += dnorm[0]
                dbg += dnorm[1]
                first, second, third = dscore.split(width, -1)
                down[b.nodes] = b.total(first.reshape(-1, heads * width))
                torch.mul(second, q, out=dkey[b.edges].view_as(q))
                torch.mul(third, q, out=dfeature[b.edges].view_as(q))
                dquery[b.nodes] = b.total((second * k).addcmul_(third, f).flatten(1))
        shape = (-1, heads, width)
        return (
            dquery.addcmul_(down, key).view(shape),
            edges.from_source.transpose(dkey).addcmul_(down, query).view(shape),
            edges.from_row.transpose(dfeature).view(shape),
            edges.gather.transpose(dvalues),
            *dparameters,
            None,
            None,
        )


def _scores(query, key, feature, own, edges: Edges, b: EdgeBlock, heads: int):
    """For the edges of a block, [e, H, C] each: query, source's key, feature key; and the score
    [e, H, 3C]."""
    width = query.shape[1] // heads
    q, o = (x.index_select(0, b.target).view(-1, heads, width) for x in (query, own))
    k = key.index_select(0, edges.source[b.edges]).view_as(q)
    f = feature.index_select(0, edges.row[b.edges]).view_as(q)
    score = q.new_empty(len(q), heads, 3 * width)
    first, second, third = score.split(width, -1)
    first.copy_(o)
    torch.mul(q, k, out=second)
    torch.mul(q, f, out=third)
    return q, k, f, score


def _layer_norm_backward(grad, x, weight, bias, eps):
    """Gradients of x, weight and bias, with the statistics of x computed anew."""
    _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, weight, bias, [True] * 3)
