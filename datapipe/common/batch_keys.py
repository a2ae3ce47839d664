"""The keys of a batch as metadata of dataclass fields, which joining and documentation follow."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a key of a batch holds."""

    shape: str
    """Letters and numbers: `A, 3`; `name → B` for a mapping of tensors."""
    dtype: str
    meaning: str
    numbers: str = ""
    """Letter of what the values number: they are shifted where batches are joined."""
    pointer: str = ""
    """Letter of what the values point into: each part's first entry, then the end."""
    join: Callable[[list[Any]], Any] | None = None
    """For values on the host: that of a batch of all parts from those of the parts."""


def tensor(shape: str, dtype: str, meaning: str, **more: Any) -> Any:
    """A field that holds a tensor; `optional`: or None, unless it is given."""
    default = {"default": None} if more.pop("optional", False) else {}
    key = Key(shape=shape, dtype=dtype, meaning=meaning, **more)
    settings: dict[str, Any] = {"metadata": {"key": key}, **default}
    return dataclasses.field(**settings)


def tensors(shape: str, dtype: str, meaning: str) -> Any:
    """A field that holds tensors by name."""
    key = Key(shape=shape, dtype=dtype, meaning=meaning)
    return dataclasses.field(default_factory=dict, metadata={"key": key})


def host(default: Any, join: Callable[[list[Any]], Any], dtype: str, meaning: str) -> Any:
    """A field on the host: a value, or with `default=list` one for each crystal."""
    shape = "B" if default is list else ""
    metadata = {"key": Key(shape=shape, dtype=dtype, meaning=meaning, join=join)}
    if default is list:
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def chained(values: list[list]) -> list:
    """One list of all."""
    return list(itertools.chain.from_iterable(values))


def unless_unknown(combine: Callable[[list[int]], int]) -> Callable[[list[int]], int]:
    """`combine`, or 0 where a part is 0: nobody counted there."""
    return lambda values: combine(values) if all(values) else 0


def join(key: Key, values: list[Any], counts: Sequence[Mapping[str, int]]) -> Any:
    """A key of a joined batch from those of its parts."""
    if key.join is not None:
        return key.join(values)
    if values[0] is None:
        return None
    if isinstance(values[0], dict):
        return {k: torch.cat([v[k] for v in values]) for k in values[0]}
    letter = key.numbers or key.pointer
    if letter:
        starts = itertools.accumulate((c[letter] for c in counts), initial=0)
        values = [value + start for value, start in zip(values, starts, strict=False)]
    if key.pointer:
        values = [*(value[:-1] for value in values[:-1]), values[-1]]
    return torch.cat(values, dim=-1 if key.shape.startswith("2, ") else 0)
