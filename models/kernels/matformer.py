"""Triton twin of the Matformer layer's messages.

Two kernels around one matrix product: score, its layer norm, gate and gated values; layer norm of
the products and sum over edges. Backward likewise. Kept for backward are the products, [E·H, C] in
their own dtype, and what has a row per node or distance.

Letters: H heads, C channels of a head (`W` in kernels, padded to the power of two `C`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from crysforge.models.kernels.comformer import NODES
from crysforge.models.kernels.matformer_norm import head_rows, norm_grad, norm_sum
from crysforge.models.ops import messages
from crysforge.models.ops.edges import Edges


@triton.jit
def _third(base, row, part, head, W, H, column, mask):
    """Rows of a table [·, H, 3, W]: one third of one head."""
    offset = (row * H + head) * 3 * W + part * W
    return tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _value(values, index, edge, part, head, W, H, column, there, mask):
    """One third of the gathered sum of the three rows of `values` that an edge sees."""
    first = tl.load(index + edge * 3, mask=there, other=0)
    second = tl.load(index + edge * 3 + 1, mask=there, other=0)
    third = tl.load(index + edge * 3 + 2, mask=there, other=0)
    total = _third(values, first, part, head, W, H, column, mask)
    total += _third(values, second, part, head, W, H, column, mask)
    return total + _third(values, third, part, head, W, H, column, mask)


@triton.jit
def _centred(x0, x1, x2, mask, W):
    """Three parts of a row of 3W, without their common mean, and the mean of their squares."""
    mean = ((tl.sum(x0, 1) + tl.sum(x1, 1) + tl.sum(x2, 1)) / (3 * W))[:, None]
    x0 = tl.where(mask, x0 - mean, 0.0)
    x1 = tl.where(mask, x1 - mean, 0.0)
    x2 = tl.where(mask, x2 - mean, 0.0)
    var = (tl.sum(x0 * x0, 1) + tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (3 * W)
    return x0, x1, x2, var


@triton.jit
def _norm_input_grad(d0, d1, d2, x0, x1, x2, rstd, mask, W):
    """Gradient of what a layer norm of 3W reads, from that of its output without affine map."""
    level = ((tl.sum(d0, 1) + tl.sum(d1, 1) + tl.sum(d2, 1)) / (3 * W))[:, None]
    along = ((tl.sum(d0 * x0, 1) + tl.sum(d1 * x1, 1) + tl.sum(d2 * x2, 1)) / (3 * W))[:, None]
    d0 = tl.where(mask, (d0 - level - x0 * along) * rstd, 0.0)
    d1 = tl.where(mask, (d1 - level - x1 * along) * rstd, 0.0)
    d2 = tl.where(mask, (d2 - level - x2 * along) * rstd, 0.0)
    return d0, d1, d2


@triton.jit
def _three(table, column, inside, W):
    """Three vectors of W that lie one after another."""
    a = tl.load(table + column, mask=inside, other=0.0)
    b = tl.load(table + W + column, mask=inside, other=0.0)
    c = tl.load(table + 2 * W + column, mask=inside, other=0.0)
    return a, b, c


@triton.jit
def _store_three(table, a, b, c, column, inside, W):
    """Writes them."""
    tl.store(table + column, a, mask=inside)
    tl.store(table + W + column, b, mask=inside)
    tl.store(table + 2 * W + column, c, mask=inside)


@triton.jit
def _gated(
    query, key, feature, values, wg, bg, target, source, row_of, index, out, edges, W, H, eps,
    P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out[e, h] = sigmoid(layer_norm(score)) · gathered values, [E, H, 3W]."""
    edge = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    head = tl.program_id(1)
    column = tl.arange(0, C)
    there, inside = edge < edges, column < W
    mask = there[:, None] & inside[None, :]
    i = tl.load(target + edge, mask=there, other=0)
    j = tl.load(source + edge, mask=there, other=0)
    r = tl.load(row_of + edge, mask=there, other=0)
    q = head_rows(query, i, head, W, H, column, mask)
    s0 = q * head_rows(key, i, head, W, H, column, mask)
    s1 = q * head_rows(key, j, head, W, H, column, mask)
    s2 = q * head_rows(feature, r, head, W, H, column, mask)
    s0, s1, s2, var = _centred(s0, s1, s2, mask, W)
    rstd = 1 / tl.sqrt(var + eps)
    for part in tl.static_range(3):
        s = s0 if part == 0 else (s1 if part == 1 else s2)
        w = tl.load(wg + part * W + column, mask=inside, other=0.0)
        b = tl.load(bg + part * W + column, mask=inside, other=0.0)
        gate = tl.sigmoid(s * rstd[:, None] * w[None, :] + b[None, :])
        v = _value(values, index, edge, part, head, W, H, column, there, mask)
        offset = (edge * H + head) * 3 * W + part * W
        tl.store(out + offset[:, None] + column[None, :], gate * v, mask=mask)


@triton.jit
def _gated_grad(
    query, key, feature, values, wg, bg, source, row_of, index, ptr, update,
    dquery, dtarget, dsource, dfeature, partial, nodes, W, H, eps,
    NODES: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Backward of `_gated` for a run of nodes. `update` [E, H, 3W] comes as the gradient of its
    output and leaves as that of the gathered values. Writes dquery and, by way of the target's
    key, dtarget [N, H, W]; dsource and dfeature [E, H, W]; sums for the norm's weight and bias."""
    run = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, C)
    inside = column < W
    w0, w1, w2 = _three(wg, column, inside, W)
    b0, b1, b2 = _three(bg, column, inside, W)
    dw0, dw1, dw2 = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    db0, db1, db2 = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for node in range(run * NODES, tl.minimum(run * NODES + NODES, nodes)):
        first, last = tl.load(ptr + node), tl.load(ptr + node + 1)
        own = (node * H + head) * W + column
        q = tl.load(query + own, mask=inside, other=0.0)
        k0 = tl.load(key + own, mask=inside, other=0.0)
        dq = tl.zeros([C], tl.float32)
        dk = tl.zeros([C], tl.float32)
        for start in range(first, last, P):
            edge = start + tl.arange(0, P)
            there = edge < last
            mask = there[:, None] & inside[None, :]
            j = tl.load(source + edge, mask=there, other=0)
            r = tl.load(row_of + edge, mask=there, other=0)
            k = head_rows(key, j, head, W, H, column, mask)
            f = head_rows(feature, r, head, W, H, column, mask)
            x0 = tl.where(mask, (q * k0)[None, :], 0.0)
            x1 = k * q[None, :]
            x2 = f * q[None, :]
            x0, x1, x2, var = _centred(x0, x1, x2, mask, W)
            rstd = (1 / tl.sqrt(var + eps))[:, None]
            x0, x1, x2 = x0 * rstd, x1 * rstd, x2 * rstd
            d0 = _pre_grad(
                values, index, update, edge, 0, head, W, H, column, there, mask, x0, w0, b0
            )
            d1 = _pre_grad(
                values, index, update, edge, 1, head, W, H, column, there, mask, x1, w1, b1
            )
            d2 = _pre_grad(
                values, index, update, edge, 2, head, W, H, column, there, mask, x2, w2, b2
            )
            dw0 += tl.sum(d0 * x0, 0)
            dw1 += tl.sum(d1 * x1, 0)
            dw2 += tl.sum(d2 * x2, 0)
            db0 += tl.sum(d0, 0)
            db1 += tl.sum(d1, 0)
            db2 += tl.sum(d2, 0)
            d0, d1, d2 = d0 * w0[None, :], d1 * w1[None, :], d2 * w2[None, :]
            d0, d1, d2 = _norm_input_grad(d0, d1, d2, x0, x1, x2, rstd, mask, W)
            at = ((edge * H + head) * W)[:, None] + column[None, :]
            tl.store(dsource + at, d1 * q[None, :], mask=mask)
            tl.store(dfeature + at, d2 * q[None, :], mask=mask)
            dk += tl.sum(d0, 0)
            dq += tl.sum(d1 * k + d2 * f, 0)
        tl.store(dquery + own, dq + dk * k0, mask=inside)
        tl.store(dtarget + own, dk * q, mask=inside)
    at = partial + (run * H + head) * 6 * W
    _store_three(at, dw0, dw1, dw2, column, inside, W)
    _store_three(at + 3 * W, db0, db1, db2, column, inside, W)


@triton.jit
def _pre_grad(values, index, update, edge, part, head, W, H, column, there, mask, x, w, b):
    """Gradient of what enters the sigmoid of one third; turns that third of `update` over."""
    gate = tl.sigmoid(x * w[None, :] + b[None, :])
    v = _value(values, index, edge, part, head, W, H, column, there, mask)
    offset = ((edge * H + head) * 3 * W + part * W)[:, None] + column[None, :]
    up = tl.load(update + offset, mask=mask, other=0.0).to(tl.float32)
    tl.debug_barrier()  # small tiles are loaded by several warps: by all before one overwrites them
    tl.store(update + offset, up * gate, mask=mask)
    return up * v * gate * (1 - gate)


class _Messages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, feature, values, wg, bg, wm, bm, wn, bn, eps, edges):
        nodes, H, W = query.shape
        with torch.autocast(query.device.type, enabled=False):
            query, key, feature = (x.float().contiguous() for x in (query, key, feature))
            values = values.contiguous()
            args = (query, key, feature, values, wg, bg)
            update = _gated_values(args, eps, edges).view(-1, 3 * W)
            product = torch.addmm(bm.to(update), update, wm.t().to(update))
            del update
            summed = torch.empty_like(query)
            if summed.numel():
                norm_sum[(nodes, H)](
                    product, wn, bn, edges.count, edges.ptr, summed, W, H, eps,
                    P=8, C=triton.next_power_of_2(W),
                )  # fmt: skip
        ctx.save_for_backward(*args, wm, wn, product)
        ctx.eps, ctx.edges = eps, edges
        return summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *args, wm, wn, product = ctx.saved_tensors
        query, key, feature, values, *_ = args
        edges, eps, (nodes, H, W) = ctx.edges, ctx.eps, query.shape
        runs, C = triton.cdiv(nodes, NODES), triton.next_power_of_2(W)
        with torch.autocast(query.device.type, enabled=False):
            update = _gated_values(args, eps, edges)
            grad = grad.float().contiguous()
            dproduct = torch.empty_like(product)
            partial = query.new_zeros(runs, H, 3, W)
            if partial.numel():
                norm_grad[(runs, H)](
                    product, wn, grad, edges.count, edges.ptr, dproduct, partial,
                    nodes, W, H, eps, NODES=NODES, P=8, C=C,
                )  # fmt: skip
            dwn, dbn, dbm = partial.sum((0, 1))
            dwm = (dproduct.t() @ update.view(-1, 3 * W)).to(wm.dtype)
            torch.mm(dproduct, wm.to(dproduct), out=update.view(-1, 3 * W))
            dquery, dtarget = torch.empty_like(query), torch.empty_like(query)
            dsource, dfeature = (values.new_empty(len(edges), H * W) for _ in range(2))
            partial = query.new_zeros(runs, H, 2, 3 * W)
            if partial.numel():
                _gated_grad[(runs, H)](
                    *args, edges.source, edges.row, edges.gather.forward.index, edges.ptr, update,
                    dquery, dtarget, dsource, dfeature, partial,
                    nodes, W, H, eps, NODES=NODES, P=4, C=C,
                )  # fmt: skip
            dwg, dbg = partial.sum((0, 1))
            dkey = dtarget.add_(edges.from_source.transpose(dsource).view_as(key))
            dfeature = edges.from_row.transpose(dfeature).to(feature).view_as(feature)
            dvalues = edges.gather.transpose(update.view(len(edges), 3 * H * W))
        return dquery, dkey, dfeature, dvalues, dwg, dbg, dwm, dbm, dwn, dbn, None, None


def _gated_values(args, eps: float, edges: Edges) -> Tensor:
    """[E, H, 3C]: see `_gated`."""
    query, _, _, values, *_ = args
    _, H, W = query.shape
    out = values.new_empty(len(edges), H, 3 * W)
    if out.numel():
        _gated[(triton.cdiv(len(edges), 8), H)](
            *args, edges.target, edges.source, edges.row, edges.gather.forward.index, out,
            len(edges), W, H, eps, P=8, C=triton.next_power_of_2(W),
        )  # fmt: skip
    return out


@messages.matformer_messages.has_twin
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
    """See `messages.matformer_messages`."""
    return _Messages.apply(
        query, key, feature_key, values, gate_norm.weight, gate_norm.bias,
        message.weight, message.bias, message_norm.weight, message_norm.bias,
        gate_norm.eps, edges,
    )  # fmt: skip
