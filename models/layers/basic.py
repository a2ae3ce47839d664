"""Small layers that several encoders share."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.models.ops.edges import Edges, Incidence, RowSum
from crysforge.models.ops.messages import comformer_messages
from crysforge.models.ops.norm import BatchNorm
from crysforge.models.ops.precision import full_precision
from crysforge.models.ops.segments import gather_sum


class RBF(nn.Module):
    """Gaussians exp(-γ (x - c)²) on `bins` centres evenly on [start, end]. By default γ = 1/spacing
    (Matformer's and ComFormer's rule; not 1/spacing²). In fp32 or the input's wider type."""

    def __init__(self, start: float, end: float, bins: int, gamma: float | None = None) -> None:
        super().__init__()
        if bins < 2:
            raise ValueError(f"a radial basis needs at least 2 bins, got {bins}")
        self.start, self.end, self.bins = start, end, bins
        self.gamma = (bins - 1) / (end - start) if gamma is None else gamma

    def extra_repr(self) -> str:
        return f"{self.start}, {self.end}, bins={self.bins}, gamma={self.gamma:g}"

    def forward(self, x: Tensor) -> Tensor:
        """[n] → [n, bins]."""
        x = full_precision(x)
        centres = torch.linspace(self.start, self.end, self.bins, device=x.device, dtype=x.dtype)
        return (x[:, None] - centres).square_().mul_(-self.gamma).exp_()


class OneHotLinear(nn.Linear):
    """Linear layer on one-hot vectors, given as indices: a look-up of the weight's columns."""

    def forward(self, index: Tensor) -> Tensor:
        """[n] int64 in 0 … in_features - 1 → [n, out_features].

        Raises:
            ValueError: an index that the layer has no input for.
        """
        # Elements end at 118, so the usual 119 inputs need no check (nor a device to wait for).
        if self.in_features < 119 and len(index) and int(index.max()) >= self.in_features:
            raise ValueError(
                f"atomic number {int(index.max())} needs more than node_inputs={self.in_features}"
            )
        return F.embedding(index, self.weight.t()) + self.bias


def compose(x: Tensor, outer: Tensor, inner: nn.Linear, bias: Tensor | float = 0.0) -> Tensor:
    """`outer` [O, D] · inner(x) + bias, [n, O] from x [n, I]. The two matrices are multiplied with
    each other first where that is less work than to take x through both.

    Both ways read the weights and call no module: under ZeRO-3 every rank must gather the same
    weights in the same order, and ranks may differ in the way they go.
    """
    (depth, width), rows = inner.weight.shape, len(outer)
    folded = rows * width * (depth + len(x))
    if folded < len(x) * depth * (width + rows):
        return F.linear(x, outer @ inner.weight, outer @ inner.bias + bias)
    return F.linear(F.linear(x, inner.weight, inner.bias), outer) + bias


class EdgeLinear(nn.Linear):
    """Linear layer on [x_target; x_source; feature] for every edge, without the concatenation:
    each block of the weight is applied where its input lives, and an edge adds up three rows."""

    def __init__(self, dim: int, features: int, out: int) -> None:
        super().__init__(2 * dim + features, out)
        self.dim = dim

    def table(self, x: Tensor, features: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """[2N+R, out], the rows whose sum an edge sees (`ops.gather_sum`)."""
        target, source, last = self.weight.split(
            [self.dim, self.dim, self.in_features - 2 * self.dim], 1
        )
        rows = F.linear(features, last, self.bias)
        to = F.linear(x, target) + offset
        return torch.cat([to, F.linear(x, source), rows.to(to.dtype)])

    def forward(  # type: ignore[override]
        self, x: Tensor, features: Tensor, edges: Edges, offset: Tensor | float = 0.0
    ) -> Tensor:
        """[E, out] from x [N, dim] and features [R, F], the rows that `edges.row` points into.
        `offset` [N, out] is added to the edges into each node."""
        return gather_sum(self.table(x, features, offset), edges)


def own_rows(edges: Edges) -> Edges:
    """The same edges with a row of the feature table for each edge, for features that differ
    between edges of equal length."""
    return replace(
        edges, row=torch.arange(len(edges), device=edges.row.device), rows=len(edges), _blocks={}
    )


def row_weight(edges: Edges) -> Tensor:
    """[R] equal edges in the batch that share a row of the feature table: its weight in batch
    statistics."""
    return edges.from_row.transpose(edges.weight[:, None])[:, 0]


def group_rows(group: Tensor, ptr: Tensor) -> Incidence:
    """[n, B]: the row of every member's group, for members in order of groups: `group` [n] of each
    member, `ptr` [B+1] first member of each group, then n."""
    each = torch.arange(len(group) + 1, device=group.device)
    return Incidence(RowSum(group, each), RowSum(each[:-1], ptr))


def line_graph(edges: Edges) -> Edges:
    """Edges between edges, whose nodes are the edges of a plain graph: one for every pair of edges
    j → k and i → j, from the latter to the former, the way back (i = k) too.

    Their number sets the size of all that follows: the device is waited for where nobody has
    counted them.
    """
    into = edges.ptr.diff()[edges.source]
    ptr = F.pad(into.cumsum(0), (1, 0))
    each = torch.arange(len(edges), device=ptr.device)
    target = each.repeat_interleave(into, output_size=edges.pairs or None)
    every = torch.arange(len(target), device=ptr.device)
    source = every - (ptr[:-1] - edges.ptr[edges.source])[target]
    ones = edges.count.new_ones(len(target))
    return Edges(
        source=source, target=target, row=every, ptr=ptr, count=ones, weight=ones, rows=len(target)
    )


class ComformerConv(nn.Module):
    """ComFormer's node attention layer: a vector-attention message, gated by the sigmoid of its
    batch-normalised score and summed over neighbours (Yan et al., ICLR 2024).

    855,296 parameters at width 256.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.edge, self.out = (
            nn.Linear(dim, dim) for _ in range(5)
        )
        self.key_hidden, self.value_hidden = (nn.Linear(3 * dim, dim) for _ in range(2))
        self.key_out, self.value_out = (nn.Linear(dim, dim) for _ in range(2))
        self.norm_score = BatchNorm(dim)
        self.norm_out = BatchNorm(dim)

    def forward(
        self, x: Tensor, features: Tensor, edges: Edges, node_multiplicity: Tensor
    ) -> Tensor:
        """Node features [N, D], all positive.

        Args:
            x: [N, D]. features: [R, D], the rows that `edges.row` points into.
            node_multiplicity: [N] atoms each node stands for.
        """
        dim = x.shape[1]
        # A weight on [target; source; edge] has three blocks, each applied where its input lives.
        hidden = self.key_hidden, self.value_hidden
        outer = torch.cat([layer.weight[:, 2 * dim :] for layer in hidden])
        bias = torch.cat([layer.bias for layer in hidden])
        key_edge, value_edge = compose(features, outer, self.edge, bias).split(dim, 1)
        messages = comformer_messages(
            self.query(x) / math.sqrt(dim),
            _table(x, self.key, self.key_hidden.weight, key_edge),
            _table(x, self.value, self.value_hidden.weight, value_edge),
            self.key_out,
            self.value_out,
            self.norm_score,
            edges,
        )
        return F.softplus(x + self.norm_out(self.out(messages), node_multiplicity))


def _table(x: Tensor, inner: nn.Linear, weight: Tensor, edge_rows: Tensor) -> Tensor:
    """Rows for `gather_sum`: blocks 0 and 1 of `weight` on inner(x), then the edge rows."""
    dim = edge_rows.shape[1]
    target, source, _ = weight.split(inner.out_features, 1)
    both = compose(x, torch.cat([target, source]), inner)
    return torch.cat([both[:, :dim], both[:, dim:], edge_rows])


class WideLinear(nn.Linear):
    """A linear layer that computes in fp32 or wider, autocast or not and however its weights are
    kept."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide), bias)
