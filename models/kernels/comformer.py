"""Triton twin of the ComFormer layer's messages.

Six kernels around four matrix products: gather and SiLU, statistics of the score, gate and sum;
backward through the gate, through the score's statistics, and through SiLU. Kept for backward are
key and value, [E, D] each in the dtype of the matrix products, and what has a row per node.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from crysforge.models.kernels.segments import gather_silu, score_moments, silu_grad_, tile
from crysforge.models.ops import messages
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.norm import BatchNorm

NODES = 8
"""Nodes whose sums for parameters one program adds up."""


@triton.jit
def _gate_sum(
    query, key, value, mean, rstd, gamma, beta, count, ptr, out, D,
    P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out[n] = Σ count · value · sigmoid(gamma · x̂ + beta) over the edges into node n, where x̂ is
    the normalised query · key."""
    node = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < D
    q = tl.load(query + node * D + column, mask=inside, other=0.0)
    m = tl.load(mean + column, mask=inside, other=0.0)
    r = tl.load(rstd + column, mask=inside, other=0.0)
    g = tl.load(gamma + column, mask=inside, other=0.0)
    b = tl.load(beta + column, mask=inside, other=0.0)
    first, last = tl.load(ptr + node), tl.load(ptr + node + 1)
    total = tl.zeros([C], tl.float32)
    for start in range(first, last, P):
        edge = start + tl.arange(0, P)
        there = edge < last
        mask = there[:, None] & inside[None, :]
        own = edge[:, None] * D + column[None, :]
        k = tl.load(key + own, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(value + own, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(count + edge, mask=there, other=0.0)
        x = (k * q[None, :] - m[None, :]) * r[None, :]
        gate = tl.sigmoid(x * g[None, :] + b[None, :])
        total += tl.sum(c[:, None] * v * gate, 0)
    tl.store(out + node * D + column, total, mask=inside)


@triton.jit
def _gate_grad(
    query, key, value, grad, mean, rstd, gamma, beta, count, ptr, dvalue, partial, nodes, D,
    NODES: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes dvalue, and over a run of nodes the sums of dgate · x̂, dgate and dvalue."""
    run = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < D
    m = tl.load(mean + column, mask=inside, other=0.0)
    r = tl.load(rstd + column, mask=inside, other=0.0)
    g = tl.load(gamma + column, mask=inside, other=0.0)
    b = tl.load(beta + column, mask=inside, other=0.0)
    by_x = tl.zeros([C], tl.float32)
    plain = tl.zeros([C], tl.float32)
    by_value = tl.zeros([C], tl.float32)
    for node in range(run * NODES, tl.minimum(run * NODES + NODES, nodes)):
        first, last = tl.load(ptr + node), tl.load(ptr + node + 1)
        q = tl.load(query + node * D + column, mask=inside, other=0.0)
        up = tl.load(grad + node * D + column, mask=inside, other=0.0)
        for start in range(first, last, P):
            edge = start + tl.arange(0, P)
            there = edge < last
            mask = there[:, None] & inside[None, :]
            own = edge[:, None] * D + column[None, :]
            k = tl.load(key + own, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(value + own, mask=mask, other=0.0).to(tl.float32)
            c = tl.load(count + edge, mask=there, other=0.0)
            x = (k * q[None, :] - m[None, :]) * r[None, :]
            gate = tl.sigmoid(x * g[None, :] + b[None, :])
            dmessage = c[:, None] * up[None, :]
            dv = dmessage * gate
            dgate = dv * v * (1 - gate)
            tl.store(dvalue + own, dv, mask=mask)
            by_x += tl.sum(dgate * x, 0)
            plain += tl.sum(dgate, 0)
            by_value += tl.sum(dv, 0)
    tl.store(partial + (run * 3 + 0) * D + column, by_x, mask=inside)
    tl.store(partial + (run * 3 + 1) * D + column, plain, mask=inside)
    tl.store(partial + (run * 3 + 2) * D + column, by_value, mask=inside)


@triton.jit
def _score_grad(
    query, key, value, grad, mean, rstd, gamma, beta, by_score, constant, share, count, ptr,
    dkey, dquery, partial, nodes, D,
    NODES: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes dkey and dquery, and over a run of nodes the sum of dkey. The score's mean and
    variance depend on all scores: the terms with `share`."""
    run = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < D
    m = tl.load(mean + column, mask=inside, other=0.0)
    r = tl.load(rstd + column, mask=inside, other=0.0)
    g = tl.load(gamma + column, mask=inside, other=0.0)
    b = tl.load(beta + column, mask=inside, other=0.0)
    slope = tl.load(by_score + column, mask=inside, other=0.0)
    level = tl.load(constant + column, mask=inside, other=0.0)
    by_key = tl.zeros([C], tl.float32)
    for node in range(run * NODES, tl.minimum(run * NODES + NODES, nodes)):
        first, last = tl.load(ptr + node), tl.load(ptr + node + 1)
        q = tl.load(query + node * D + column, mask=inside, other=0.0)
        up = tl.load(grad + node * D + column, mask=inside, other=0.0)
        total = tl.zeros([C], tl.float32)
        for start in range(first, last, P):
            edge = start + tl.arange(0, P)
            there = edge < last
            mask = there[:, None] & inside[None, :]
            own = edge[:, None] * D + column[None, :]
            k = tl.load(key + own, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(value + own, mask=mask, other=0.0).to(tl.float32)
            c = tl.load(count + edge, mask=there, other=0.0)
            s = tl.load(share + edge, mask=there, other=0.0)
            x = (k * q[None, :] - m[None, :]) * r[None, :]
            gate = tl.sigmoid(x * g[None, :] + b[None, :])
            dgate = c[:, None] * up[None, :] * v * gate * (1 - gate)
            dscore = dgate * (g * r)[None, :]
            dscore += s[:, None] * (x * slope[None, :] + level[None, :])
            dk = dscore * q[None, :]
            tl.store(dkey + own, dk, mask=mask)
            total += tl.sum(dscore * k, 0)
            by_key += tl.sum(dk, 0)
        tl.store(dquery + node * D + column, total, mask=inside)
    tl.store(partial + run * D + column, by_key, mask=inside)


class _Messages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, values, wk, bk, wv, bv, gamma, beta, norm, edges):
        with torch.autocast(query.device.type, enabled=False):
            query, keys, values = query.float().contiguous(), keys.contiguous(), values.contiguous()
            key, value = _linear(keys, wk, bk, edges), _linear(values, wv, bv, edges)
            weight = edges.weight.float()
            parts = []
            if norm.training:
                parts.append(score_moments(key, weight, query, edges.target))
            standard = norm.standard(parts, weight)
            summed = torch.empty_like(query)
            if summed.numel():
                C = tile(query.shape[1])
                _gate_sum[(len(query), triton.cdiv(query.shape[1], C))](
                    query, key, value, standard.mean, standard.rstd, gamma, beta,
                    edges.count, edges.ptr, summed, query.shape[1], P=16, C=C,
                )  # fmt: skip
        ctx.save_for_backward(query, keys, values, wk, wv, gamma, beta, key, value)
        ctx.edges, ctx.standard = edges, standard
        return summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, keys, values, wk, wv, gamma, beta, key, value = ctx.saved_tensors
        edges, standard, D = ctx.edges, ctx.standard, query.shape[1]
        runs, C = triton.cdiv(len(query), NODES), tile(D, 64)  # 128 take most registers
        grid = (runs, triton.cdiv(D, C))
        with torch.autocast(query.device.type, enabled=False):
            grad = grad.float().contiguous()
            shared = (query, key, value, grad, standard.mean, standard.rstd, gamma, beta)
            dvalue = torch.empty_like(value)
            partial = query.new_zeros(runs, 3, D)
            if partial.numel():
                _gate_grad[grid](
                    *shared, edges.count, edges.ptr, dvalue, partial, len(query), D,
                    NODES=NODES, P=16, C=C,
                )  # fmt: skip
            dgamma, dbeta, dbv = partial.sum(0)
            dvalues, dwv = _linear_grad(dvalue, values, wv, edges)
            del dvalue

            totals = standard.sum_over_ranks(torch.stack([dgamma, dbeta]))
            by_score, constant = -totals * (standard.rstd * gamma)
            dkey, dquery, partial = (
                torch.empty_like(key), torch.empty_like(query), query.new_zeros(runs, D),
            )  # fmt: skip
            if partial.numel():
                _score_grad[grid](
                    *shared, by_score, constant, standard.share, edges.count, edges.ptr,
                    dkey, dquery, partial, len(query), D, NODES=NODES, P=16, C=C,
                )  # fmt: skip
            dkeys, dwk = _linear_grad(dkey, keys, wk, edges)
        dbk = partial.sum(0)
        return dquery, dkeys, dvalues, dwk, dbk, dwv, dbv, dgamma, dbeta, None, None


def _linear(table: Tensor, weight: Tensor, bias: Tensor, edges: Edges) -> Tensor:
    """silu(gather_sum(table)) @ weight.t() + bias, [E, D]."""
    hidden = gather_silu(table, edges)
    return torch.addmm(bias.to(hidden), hidden, weight.t().to(hidden))


def _linear_grad(grad: Tensor, table: Tensor, weight: Tensor, edges: Edges):
    """Gradients of table and weight from that of `_linear`'s output."""
    dhidden = grad @ weight.to(grad)
    act = silu_grad_(dhidden, table, edges)
    dweight = (grad.t() @ act).to(weight.dtype)
    return edges.gather.transpose(dhidden), dweight


@messages.comformer_messages.has_twin
def comformer_messages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_out: nn.Linear,
    value_out: nn.Linear,
    norm: BatchNorm,
    edges: Edges,
) -> Tensor:
    """See `messages.comformer_messages`."""
    return _Messages.apply(
        query, keys, values, key_out.weight, key_out.bias, value_out.weight, value_out.bias,
        norm.weight, norm.bias, norm, edges,
    )  # fmt: skip
