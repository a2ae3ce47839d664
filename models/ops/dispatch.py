"""Operations with a plain definition and a Triton twin, and the choice between the two.

This file knows no kernel: `crysforge.models.kernels` registers the twins, and `kernels.enable` says
which devices and dtypes they serve.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ENVIRONMENT = "CRYSFORGE_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels are written for."""

enabled: set[tuple[torch.device, torch.dtype]] = set()
"""Devices and dtypes whose kernels were tried and agree with the definitions."""
_forced: str | None = None


@contextmanager
def forced(choice: str) -> Iterator[None]:
    """Within it this choice ("torch" or "triton") holds. Not for several threads."""
    global _forced  # a backward pass runs in a thread of its own, which sees no context variable
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def chosen() -> str:
    """The choice in force: that of `forced`, else of the environment, else "auto"."""
    return _forced or os.environ.get(ENVIRONMENT, "auto")


def wanted(x: Tensor) -> bool:
    """Whether tensors like x are served by the Triton twins."""
    if _forced is not None:
        return _forced == "triton" and x.dtype in DTYPES
    return (x.device, x.dtype) in enabled


class Op(Generic[T]):
    """A function with a plain definition and perhaps a Triton twin, which serves the devices and
    dtypes that `wanted` says."""

    def __init__(self, plain: Callable[..., T]) -> None:
        functools.update_wrapper(self, plain)
        self.plain = plain
        self.twin: Callable[..., T] | None = None

    def has_twin(self, twin: Callable[..., T]) -> Callable[..., T]:
        """Decorator: the function is the twin."""
        self.twin = twin
        return twin

    def __call__(self, x: Tensor, *args, **kwargs) -> T:
        twin = self.twin if wanted(x) else None
        if twin is None:
            return self.plain(x, *args, **kwargs)
        with torch.cuda.device_of(x):  # Triton starts kernels on the current GPU, whatever x is on
            return twin(x, *args, **kwargs)
