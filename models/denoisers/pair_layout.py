"""Pairs of atoms inside crystals, each unordered pair once, crystals of equal size side by side.

Letters: A atoms, B crystals, P ordered pairs (an atom with itself too), Q unordered pairs i < j,
D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PairLayout:
    """Where the atoms and pairs of a packed batch lie once its crystals are sorted by size. All
    indices but `atoms` and `crystals` count in that order."""

    atoms: Tensor | None
    """[A] the sorted atoms; None: they are sorted already."""
    crystals: Tensor | None
    """[B] the sorted crystals, likewise."""
    batch: Tensor
    """[A] crystal of each atom."""
    ptr: Tensor
    """[B+1] first atom of each crystal, then A."""
    runs: tuple[tuple[int, int], ...]
    """(atoms, crystals) of each run of crystals of equal size."""
    first: Tensor
    """[Q] atom i of each unordered pair."""
    second: Tensor
    """[Q] its atom j > i."""
    forward: Tensor
    """[Q] where the ordered pair (i, j) is among all."""
    backward: Tensor
    """[Q] where (j, i) is."""
    own: Tensor
    """[A] where (i, i) is."""

    @classmethod
    def of(cls, batch: Tensor, ptr: Tensor, sizes: Sequence[int] | None = None) -> PairLayout:
        """Of the crystals that start at `ptr`.

        Args:
            batch: [A] crystal of each atom. ptr: [B+1] first atom of each, then A.
            sizes: atoms of each crystal, if the host knows; else a GPU is waited for.
        """
        sizes = ptr.diff().tolist() if sizes is None else list(sizes)
        atoms = crystals = None
        if sizes != sorted(sizes):
            each = ptr.diff()
            crystals = torch.argsort(each, stable=True)
            atoms = torch.argsort(each[batch], stable=True)
            rank = torch.empty_like(crystals)
            rank[crystals] = torch.arange(len(crystals), device=ptr.device)
            batch = rank[batch][atoms]
            ptr = torch.nn.functional.pad(each[crystals].cumsum(0), (1, 0))
        runs = tuple((n, len(list(same))) for n, same in groupby(sorted(sizes)))
        return cls(atoms, crystals, batch, ptr, runs, *_indices(runs, ptr.device))

    @property
    def pairs(self) -> int:
        """P."""
        return sum(n * n * count for n, count in self.runs)

    def sort_atoms(self, x: Tensor) -> Tensor:
        """[A, …] in the order of the batch → sorted."""
        return x if self.atoms is None else x[self.atoms]

    def sort_crystals(self, x: Tensor) -> Tensor:
        """[B, …] in the order of the batch → sorted."""
        return x if self.crystals is None else x[self.crystals]

    def unsort_atoms(self, x: Tensor) -> Tensor:
        """[A, …] sorted → in the order of the batch."""
        return x if self.atoms is None else torch.empty_like(x).index_copy(0, self.atoms, x)

    def of_each(self, x: Tensor) -> list[Tensor]:
        """Rows of ordered pairs [P, D] as [crystals, n, n, D] for each run: views."""
        parts = x.split([n * n * count for n, count in self.runs])
        return [p.view(c, n, n, -1) for p, (n, c) in zip(parts, self.runs, strict=True)]

    def atoms_of_each(self, x: Tensor) -> list[Tensor]:
        """Rows of sorted atoms [A, D] as [crystals, n, D] for each run: views."""
        parts = x.split([n * count for n, count in self.runs])
        return [p.view(c, n, -1) for p, (n, c) in zip(parts, self.runs, strict=True)]


def _indices(runs: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    parts: list[list[Tensor]] = [[], [], [], [], []]
    atom = pair = 0
    for n, count in runs:
        i, j = torch.triu_indices(n, n, 1, device=device)
        crystal = torch.arange(count, device=device)[:, None]
        start, corner = atom + n * crystal, pair + n * n * crystal
        diagonal = (n + 1) * torch.arange(n, device=device)
        found = (start + i, start + j, corner + n * i + j, corner + n * j + i, corner + diagonal)
        for part, value in zip(parts, found, strict=True):
            part.append(value.flatten())
        atom, pair = atom + n * count, pair + n * n * count
    return [torch.cat(part) for part in parts]


def pair_sum(
    target: Tensor, source: Tensor, even: Tensor, odd: Tensor, own: Tensor, layout: PairLayout
) -> Tensor:
    """What an ordered pair (i, j) sees: target_i + source_j + even_ij ± odd_ij, [P, D].

    Args:
        target, source: [A, D] of sorted atoms.
        even: [Q, D], equal for (i, j) and (j, i). odd: [Q, D], which changes sign.
        own: [D], the even part of an atom with itself.
    """
    return _PairSum.apply(target, source, even, odd, own, layout)


class _PairSum(torch.autograd.Function):
    """One buffer for all pairs; the gradient is gathers and sums over axes, nothing atomic."""

    @staticmethod
    def forward(
        ctx: Any,
        target: Tensor,
        source: Tensor,
        even: Tensor,
        odd: Tensor,
        own: Tensor,
        layout: PairLayout,
    ) -> Tensor:
        ctx.layout = layout
        out = target.new_empty(layout.pairs, target.shape[1])
        out.index_copy_(0, layout.forward, even + odd)
        out.index_copy_(0, layout.backward, even - odd)
        out.index_copy_(0, layout.own, own.expand(len(layout.own), -1))
        at, by = layout.atoms_of_each(target), layout.atoms_of_each(source)
        for part, to, come in zip(layout.of_each(out), at, by, strict=True):
            part += to[:, :, None]
            part += come[:, None]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout: PairLayout = ctx.layout
        grad = grad.contiguous()
        parts = layout.of_each(grad)
        target = torch.cat([p.sum(2).flatten(0, 1) for p in parts])
        source = torch.cat([p.sum(1).flatten(0, 1) for p in parts])
        there, back, own = (
            grad.index_select(0, where) for where in (layout.forward, layout.backward, layout.own)
        )
        return target, source, there + back, there - back, own.sum(0), None


def source_mean(x: Tensor, layout: PairLayout) -> Tensor:
    """Mean over j of rows (i, j) [P, D] → [A, D], sorted atoms."""
    return torch.cat([part.mean(2).flatten(0, 1) for part in layout.of_each(x)])
