"""Kernels of the layer norm behind Matformer's messages, summed over the edges into a node."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_rows(base, row, head, W, H, column, mask):
    """Rows of a table [·, H, W]: one head."""
    offset = (row * H + head) * W
    return tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm_sum(product, wn, bn, count, ptr, out, W, H, eps, P: tl.constexpr, C: tl.constexpr):
    """out[n, h] = Σ count · layer_norm(product) over the edges into node n."""
    node = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, C)
    inside = column < W
    first, last = tl.load(ptr + node), tl.load(ptr + node + 1)
    total, weights = tl.zeros([C], tl.float32), tl.zeros([P], tl.float32)
    for start in range(first, last, P):
        edge = start + tl.arange(0, P)
        there = edge < last
        mask = there[:, None] & inside[None, :]
        x = head_rows(product, edge, head, W, H, column, mask)
        c = tl.load(count + edge, mask=there, other=0.0)
        x = tl.where(mask, x - (tl.sum(x, 1) / W)[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / W + eps)
        total += tl.sum((c * rstd)[:, None] * x, 0)
        weights += c
    w = tl.load(wn + column, mask=inside, other=0.0)
    b = tl.load(bn + column, mask=inside, other=0.0)
    total = total * w + tl.sum(weights, 0) * b
    tl.store(out + (node * H + head) * W + column, total, mask=inside)


@triton.jit
def norm_grad(
    product, wn, grad, count, ptr, dproduct, partial, nodes, W, H, eps,
    NODES: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes dproduct, and over a run of nodes the sums for weight and bias of the norm and for
    the bias before it."""
    run = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, C)
    inside = column < W
    w = tl.load(wn + column, mask=inside, other=0.0)
    dw = tl.zeros([C], tl.float32)
    db = tl.zeros([C], tl.float32)
    dbias = tl.zeros([C], tl.float32)
    for node in range(run * NODES, tl.minimum(run * NODES + NODES, nodes)):
        first, last = tl.load(ptr + node), tl.load(ptr + node + 1)
        up = tl.load(grad + (node * H + head) * W + column, mask=inside, other=0.0)
        for start in range(first, last, P):
            edge = start + tl.arange(0, P)
            there = edge < last
            mask = there[:, None] & inside[None, :]
            x = head_rows(product, edge, head, W, H, column, mask)
            c = tl.load(count + edge, mask=there, other=0.0)
            x = tl.where(mask, x - (tl.sum(x, 1) / W)[:, None], 0.0)
            rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / W + eps)
            x *= rstd[:, None]
            dy = c[:, None] * up[None, :]
            dw += tl.sum(dy * x, 0)
            db += tl.sum(dy, 0)
            dx = dy * w[None, :]
            along = tl.sum(dx * x, 1) / W
            dx = (dx - (tl.sum(dx, 1) / W)[:, None] - x * along[:, None]) * rstd[:, None]
            dx = tl.where(mask, dx, 0.0)
            dbias += tl.sum(dx, 0)
            offset = (edge * H + head) * W
            tl.store(dproduct + offset[:, None] + column[None, :], dx, mask=mask)
    at = (run * H + head) * 3 * W + column
    tl.store(partial + at, dw, mask=inside)
    tl.store(partial + at + W, db, mask=inside)
    tl.store(partial + at + 2 * W, dbias, mask=inside)
