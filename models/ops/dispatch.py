"""Operations with a plain definition and a Triton twin, and the choice between the two."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from crysforge.models import kernels

T = TypeVar("T")


class Op(Generic[T]):
    """A function with a plain definition and perhaps a twin of Triton kernels, which serves the
    devices and types that `kernels.wanted` says."""

    def __init__(self, plain: Callable[..., T]) -> None:
        functools.update_wrapper(self, plain)
        self.plain = plain
        self.twin: Callable[..., T] | None = None

    def has_twin(self, twin: Callable[..., T]) -> Callable[..., T]:
        """Decorator: the function is the twin."""
        self.twin = twin
        return twin

    def __call__(self, x: Tensor, *args, **kwargs) -> T:
        twin = self.twin if kernels.wanted(x) else None
        if twin is None:
            return self.plain(x, *args, **kwargs)
        with torch.cuda.device_of(x):  # Triton starts kernels on the current GPU, whatever x is on
            return twin(x, *args, **kwargs)
