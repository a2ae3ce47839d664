"""Sums over pairs of edges that follow one another, weighted by the angle between them, at a cost
that goes with the number of edges.

Letters in shapes: N nodes, E edges, L degrees, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crysforge.models.layers.spherical import spherical_harmonics
from crysforge.models.ops.edges import Edges, Incidence, RowSum


@dataclass(frozen=True, eq=False)
class Turns:
    """For every edge j → i the edges k → j, but for the way back (k → j is i → j).

    What they are weighted with is a sum of Legendre polynomials of the angle, and a polynomial is a
    sum of products of spherical harmonics (the addition theorem). So the edges into a node are
    summed up once for each harmonic, every edge out of it reads these sums, and no pair is formed:
    exact, and memory does not go with the square of the number of neighbours.
    """

    into: Incidence
    """[N·L², E·L]: sum over the edges into each node, times each harmonic of the edge."""
    out: Incidence
    """[E, N·L²]: sum over the harmonics of the edge, times what its source has for each."""
    reverse: Incidence
    """[E, E]: the edge that goes the other way."""

    @classmethod
    def of(cls, edges: Edges, vectors: Tensor, degrees: int) -> Turns:
        """From edge vectors [E, 3], target minus source, of a plain graph in which every edge goes
        both ways and is there once."""
        y = spherical_harmonics(F.normalize(vectors, dim=1), degrees)
        each = torch.arange(len(edges) + 1, device=y.device)
        harmonic = torch.arange(degrees**2, device=y.device)
        degree = torch.arange(degrees, device=y.device)
        degree_of = harmonic.to(y).sqrt().long()

        edge, which, weight, ptr = _by_node(each[:-1], edges.ptr, y)
        ends = F.pad((each[:-1, None] * len(harmonic) + degree**2).flatten(), (0, 1))
        ends[-1] = y.numel()
        at_target = (edges.target[:, None] * len(harmonic) + harmonic).flatten()
        into = Incidence(
            RowSum(edge * degrees + degree_of[which], ptr, weight),
            RowSum(at_target, ends, y.flatten()),
        )
        leaving = edges.from_source.transpose
        edge, _, weight, ptr = _by_node(leaving.index, leaving.ptr, y)
        at_source = (edges.source[:, None] * len(harmonic) + harmonic).flatten()
        out = Incidence(
            RowSum(at_source, each * len(harmonic), y.flatten()), RowSum(edge, ptr, weight)
        )
        back = RowSum(reverse_edges(edges, vectors), each)
        return cls(into, out, Incidence(back, back))

    def __call__(self, x: Tensor) -> Tensor:
        """[E, L, D] → [E, D]: the sum, over the edges k → j that lead to j → i and over degrees l,
        of row l of k → j times P_l of the cosine of the angle between the two."""
        sign = x.new_ones(x.shape[1])
        sign[1::2] = -1  # P_l of a turn by 180°
        back = self.reverse((x * sign[:, None]).sum(1))
        return self.out(self.into(x.flatten(0, 1))) - back


def _by_node(order: Tensor, ptr: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entries of y [E, H] in order of node, then column, then edge: edge, column and value of
    each, [E·H], and the first entry of each node and column, [N·H + 1].

    Args:
        order: [E] edges in order of node. ptr: [N+1] first edge of each node, then E.
    """
    (edges, columns), size = y.shape, ptr.diff()
    column = torch.arange(columns, device=y.device)
    node = torch.arange(len(size), device=y.device)
    node = node.repeat_interleave(size, output_size=edges)
    place = torch.arange(edges, device=y.device) - ptr[node]
    at = (ptr[node] * columns + place)[:, None] + column * size[node, None]
    edge, which = (torch.empty(y.numel(), dtype=torch.int64, device=y.device) for _ in range(2))
    weight = torch.empty_like(y).flatten()
    edge[at], which[at], weight[at] = order[:, None], column, y[order]
    first = (ptr[:-1, None] * columns + column * size[:, None]).flatten()
    return edge, which, weight, torch.cat([first, ptr[-1:] * columns])


def reverse_edges(edges: Edges, vectors: Tensor) -> Tensor:
    """[E] for every edge the one that goes the other way: ends swapped, opposite vector."""
    there = _ranked(edges.source, edges.target, vectors)
    back = _ranked(edges.target, edges.source, -vectors)
    return torch.empty_like(there).scatter_(0, back, there)


def _ranked(first: Tensor, second: Tensor, vectors: Tensor) -> Tensor:
    """[E] edges in order of two nodes, then of the vector in whole 1e-3 Å. The offset keeps round
    numbers off the boundary between two whole ones."""
    x, y, z = torch.round(vectors.double() * 1000 + 0.123).long().unbind(1)
    order = ((x << 42) + (y << 21) + z).argsort(stable=True)
    order = order[second[order].argsort(stable=True)]
    return order[first[order].argsort(stable=True)]
