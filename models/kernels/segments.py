"""Triton twins of gathers, segment sums, neighbour softmax and batch statistics.

Letters in shapes: E edges, N nodes, D channels. Rows are contiguous; offsets of rows are 64 bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crysforge.models.ops import edges as matrices
from crysforge.models.ops import norm, segments
from crysforge.models.ops.edges import Edges, RowSum


def tile(width: int, most: int = 128) -> int:
    """Channels that one program takes: a power of two."""
    return min(triton.next_power_of_2(max(width, 1)), most)


@triton.jit
def _row_sum(
    x, index, ptr, weight, out, D, WEIGHTED: tl.constexpr, P: tl.constexpr, C: tl.constexpr
):
    """out[r] = Σ weight[p] · x[index[p]] over p in ptr[r] … ptr[r+1]; one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < D
    first, last = tl.load(ptr + row), tl.load(ptr + row + 1)
    total = tl.zeros([C], tl.float32)
    for start in range(first, last, P):
        place = start + tl.arange(0, P)
        there = place < last
        source = tl.load(index + place, mask=there, other=0)
        mask = there[:, None] & inside[None, :]
        rows = tl.load(x + source[:, None] * D + column[None, :], mask=mask, other=0.0)
        rows = rows.to(tl.float32)
        if WEIGHTED:
            rows *= tl.load(weight + place, mask=there, other=0.0)[:, None]
        total += tl.sum(rows, 0)
    tl.store(out + row * D + column, total, mask=inside)


@triton.jit
def _gather(
    x, index, weight, out, rows, D,
    K: tl.constexpr, WEIGHTED: tl.constexpr, SILU: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out[r] = Σ weight[Kr + j] · x[index[Kr + j]] over j < K, then SiLU if asked."""
    row = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    column = tl.program_id(1) * C + tl.arange(0, C)
    there = row < rows
    mask = there[:, None] & (column < D)[None, :]
    total = tl.zeros([P, C], tl.float32)
    for j in tl.static_range(K):
        source = tl.load(index + row * K + j, mask=there, other=0)
        part = tl.load(x + source[:, None] * D + column[None, :], mask=mask, other=0.0)
        part = part.to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weight + row * K + j, mask=there, other=0.0)[:, None]
        total += part
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(out + row[:, None] * D + column[None, :], total, mask=mask)


@matrices.row_sum.has_twin
def row_sum(x: Tensor, matrix: RowSum) -> Tensor:
    """See `edges.row_sum`."""
    x = x.contiguous()
    out = x.new_empty(len(matrix.ptr) - 1, x.shape[1])
    if out.numel() == 0:
        return out
    weight, weighted = _weight(matrix.weight, x)
    C = tile(x.shape[1])
    columns = triton.cdiv(x.shape[1], C)
    if matrix.each:
        grid = (triton.cdiv(len(out), 16), columns)
        _gather[grid](
            x, matrix.index, weight, out, len(out), x.shape[1],
            K=matrix.each, WEIGHTED=weighted, SILU=False, P=16, C=C,
        )  # fmt: skip
    else:
        _row_sum[(len(out), columns)](
            x, matrix.index, matrix.ptr, weight, out, x.shape[1], WEIGHTED=weighted, P=16, C=C
        )
    return out


def gather_silu(table: Tensor, edges: Edges) -> Tensor:
    """silu(gather_sum(table)), [E, D]."""
    out = table.new_empty(len(edges), table.shape[1])
    if out.numel():
        C = tile(table.shape[1])
        grid = (triton.cdiv(len(out), 16), triton.cdiv(table.shape[1], C))
        index = edges.gather.forward.index
        _gather[grid](
            table, index, table, out, len(out), table.shape[1],
            K=3, WEIGHTED=False, SILU=True, P=16, C=C,
        )  # fmt: skip
    return out


@triton.jit
def _silu_grad(table, index, grad, act, rows, D, P: tl.constexpr, C: tl.constexpr):
    """Writes act = silu(h) and turns grad, that of act, into that of h = gather_sum(table)."""
    row = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    column = tl.program_id(1) * C + tl.arange(0, C)
    there = row < rows
    mask = there[:, None] & (column < D)[None, :]
    hidden = tl.zeros([P, C], tl.float32)
    for j in tl.static_range(3):
        source = tl.load(index + row * 3 + j, mask=there, other=0)
        part = tl.load(table + source[:, None] * D + column[None, :], mask=mask, other=0.0)
        hidden += part.to(tl.float32)
    gate = tl.sigmoid(hidden)
    own = row[:, None] * D + column[None, :]
    value = tl.load(grad + own, mask=mask, other=0.0).to(tl.float32)
    tl.store(act + own, hidden * gate, mask=mask)
    tl.store(grad + own, value * gate * (1 + hidden * (1 - gate)), mask=mask)


def silu_grad_(grad: Tensor, table: Tensor, edges: Edges) -> Tensor:
    """Turns grad [E, D] of silu(gather_sum(table)) into that of the sum, in place; gives back the
    activations [E, D]."""
    act = torch.empty_like(grad)
    if act.numel():
        C = tile(grad.shape[1])
        grid = (triton.cdiv(len(grad), 16), triton.cdiv(grad.shape[1], C))
        index = edges.gather.forward.index
        _silu_grad[grid](table, index, grad, act, len(grad), grad.shape[1], P=16, C=C)
    return act


@triton.jit
def _softmax(scores, count, ptr, out, D, P: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < D
    first, last = tl.load(ptr + row), tl.load(ptr + row + 1)
    top = tl.full([C], -float("inf"), tl.float32)
    for start in range(first, last, P):
        place = start + tl.arange(0, P)
        mask = (place < last)[:, None] & inside[None, :]
        x = tl.load(scores + place[:, None] * D + column[None, :], mask=mask, other=-float("inf"))
        top = tl.maximum(top, tl.max(x.to(tl.float32), 0))
    top = tl.where(inside, top, 0.0)
    total = tl.zeros([C], tl.float32)
    for start in range(first, last, P):
        place = start + tl.arange(0, P)
        mask = (place < last)[:, None] & inside[None, :]
        x = tl.load(scores + place[:, None] * D + column[None, :], mask=mask, other=-float("inf"))
        c = tl.load(count + place, mask=place < last, other=0.0)
        e = tl.where(mask, tl.exp(x.to(tl.float32) - top[None, :]), 0.0)
        total += tl.sum(c[:, None] * e, 0)
    total = tl.where(total > 0, total, 1.0)
    for start in range(first, last, P):
        place = start + tl.arange(0, P)
        mask = (place < last)[:, None] & inside[None, :]
        own = place[:, None] * D + column[None, :]
        x = tl.load(scores + own, mask=mask, other=-float("inf")).to(tl.float32)
        tl.store(out + own, tl.exp(x - top[None, :]) / total[None, :], mask=mask)


@triton.jit
def _softmax_grad(grad, softmax, count, ptr, out, D, P: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < D
    first, last = tl.load(ptr + row), tl.load(ptr + row + 1)
    total = tl.zeros([C], tl.float32)
    for start in range(first, last, P):
        place = start + tl.arange(0, P)
        mask = (place < last)[:, None] & inside[None, :]
        own = place[:, None] * D + column[None, :]
        p = tl.load(softmax + own, mask=mask, other=0.0)
        total += tl.sum(p * tl.load(grad + own, mask=mask, other=0.0), 0)
    for start in range(first, last, P):
        place = start + tl.arange(0, P)
        mask = (place < last)[:, None] & inside[None, :]
        own = place[:, None] * D + column[None, :]
        p = tl.load(softmax + own, mask=mask, other=0.0)
        g = tl.load(grad + own, mask=mask, other=0.0)
        c = tl.load(count + place, mask=place < last, other=0.0)
        tl.store(out + own, p * (g - c[:, None] * total[None, :]), mask=mask)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, edges: Edges) -> Tensor:
        scores = scores.contiguous()
        out = torch.empty_like(scores, dtype=torch.float32)
        _over_segments(_softmax, edges, out, scores, edges.count, edges.ptr, out)
        ctx.save_for_backward(out)
        ctx.edges, ctx.dtype = edges, scores.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (softmax,) = ctx.saved_tensors
        edges, out = ctx.edges, torch.empty_like(softmax)
        args = (grad.contiguous(), softmax, edges.count, edges.ptr, out)
        _over_segments(_softmax_grad, edges, out, *args)
        return out.to(ctx.dtype), None


def _over_segments(kernel, edges: Edges, like: Tensor, *args) -> None:
    """Starts a program for each node and tile of channels."""
    if like.numel():
        C = tile(like.shape[1])
        kernel[(edges.num_nodes, triton.cdiv(like.shape[1], C))](*args, like.shape[1], P=16, C=C)


@segments.segment_softmax.has_twin
def segment_softmax(scores: Tensor, edges: Edges) -> Tensor:
    """See `segments.segment_softmax`."""
    return _Softmax.apply(scores, edges)


@triton.jit
def _moments(
    x, query, target, weight, totals, means, m2s, rows, D,
    QUERY: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Moments of P rows of x, times the target's row of query if asked."""
    part = tl.program_id(0).to(tl.int64)
    row = part * P + tl.arange(0, P)
    column = tl.program_id(1) * C + tl.arange(0, C)
    there, inside = row < rows, column < D
    mask = there[:, None] & inside[None, :]
    value = tl.load(x + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if QUERY:
        node = tl.load(target + row, mask=there, other=0)
        value *= tl.load(query + node[:, None] * D + column[None, :], mask=mask, other=0.0)
    w = tl.load(weight + row, mask=there, other=0.0)
    total = tl.sum(w, 0)
    mean = tl.sum(w[:, None] * value, 0) / tl.maximum(total, 1.0)
    away = value - mean[None, :]
    m2 = tl.sum(w[:, None] * away * away, 0)
    tl.store(totals + part, total)
    tl.store(means + part * D + column, mean, mask=inside)
    tl.store(m2s + part * D + column, m2, mask=inside)


def score_moments(x: Tensor, weight: Tensor, query: Tensor | None, target: Tensor) -> norm.Moments:
    """Moments of the rows of x [n, D] with weights [n]; with query, of x times its row `target`."""
    P, C, D = 64, tile(x.shape[1], 64), x.shape[1]
    parts = max(triton.cdiv(len(x), P), 1)
    totals = torch.empty(parts, dtype=torch.float32, device=x.device)
    means, m2s = (totals.new_empty(parts, D) for _ in range(2))
    other = x if query is None else query
    _moments[(parts, triton.cdiv(D, C))](
        x, other, target, weight, totals, means, m2s, len(x), D,
        QUERY=query is not None, P=P, C=C,
    )  # fmt: skip
    return norm.merged(norm.Moments(totals, means, m2s))


@norm.moments.has_twin
def moments(x: Tensor, weight: Tensor) -> norm.Moments:
    """See `norm.moments`."""
    return score_moments(x.contiguous(), weight.contiguous(), None, weight)


def _weight(weight: Tensor | None, x: Tensor) -> tuple[Tensor, bool]:
    """A pointer to hand over, and whether anything is to be read there."""
    return (x, False) if weight is None else (weight.float().contiguous(), True)
