"""Where the rows of a field lie, and the draws that belong to them.

A state is packed groups of members: a field has a row for each member or one for each group. All
draws are functions of the groups' keys, the field's name, the step and the member's number, so that
they do not depend on what else is in the batch.

Letters: A members, B groups, R rows of a field, C its columns.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crysforge.models.ops.keyed_random import derive, keyed_normal, keyed_uniform, member_keys
from crysforge.models.ops.segments import crystal_mean


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one field."""

    key: Tensor
    """[R] int64, seed of a row's draws."""
    group: Tensor
    """[R] group of each row."""
    ptr: Tensor | None
    """[B+1] first row of each group, then R; None where each group has one."""
    dtype: torch.dtype
    """Of what is drawn."""

    def normal(self, width: int, salt: int) -> Tensor:
        """[R, width] standard normal numbers; one salt per purpose and step."""
        return keyed_normal(derive(self.key, salt), width, 0).to(self.dtype)

    def uniform(self, width: int, salt: int) -> Tensor:
        """[R, width] uniform numbers in [0, 1)."""
        return keyed_uniform(derive(self.key, salt), width, 0).to(self.dtype)

    def centred(self, x: Tensor) -> Tensor:
        """[R, C] minus its mean over each group."""
        if self.ptr is None:
            return torch.zeros_like(x)
        return x - crystal_mean(x, self.ptr)[self.group]


@dataclass(frozen=True, eq=False)
class Packing:
    """Groups of members, one after another."""

    key: Tensor
    """[B] int64, seed of all draws of a group."""
    batch: Tensor
    """[A] group of each member."""
    ptr: Tensor
    """[B+1] first member of each group, then A."""
    sizes: tuple[int, ...]
    """Members of each group, on the host."""
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, key: Tensor, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> Packing:
        """Of groups with so many members, and keys [B]."""
        each = torch.tensor(list(sizes), device=key.device)
        batch = torch.repeat_interleave(torch.arange(len(each), device=key.device), each)
        ptr = torch.nn.functional.pad(each.cumsum(0), (1, 0))
        return cls(key, batch, ptr, tuple(sizes), dtype)

    def rows(self, field: str, of_members: bool) -> Rows:
        """The rows of a field, with draws of its own."""
        key = derive(self.key, zlib.crc32(field.encode()))
        group = torch.arange(len(key), device=key.device)
        if not of_members:
            return Rows(key, group, None, self.dtype)
        return Rows(member_keys(key, self.batch, self.ptr), self.batch, self.ptr, self.dtype)
