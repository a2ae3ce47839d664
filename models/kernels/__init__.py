"""Triton twins of the operations that models are made of, and the choice between the two.

A GPU takes the twins where Triton is installed and a small trial on the device agrees with the
plain definitions, forward and backward; everything else takes the definitions.
`CRYSFORGE_KERNELS=torch` or `=triton` overrides the choice (on a CPU, `triton` needs Triton's
interpreter: `TRITON_INTERPRET=1`).

Each kernel writes every output once and sums in fp32 in a fixed order: no atomics, equal bits in
every run. Matrix products are left to the vendor's library.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from crysforge.models.registry import nearest

CHOICES = ("auto", "torch", "triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODULES = ("segments", "comformer", "matformer", "modulation")
_forced: str | None = None


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Within it this choice holds, whatever the environment says. Not for several threads."""
    global _forced  # a backward pass runs in a thread of its own, which sees no context variable
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def wanted(x: Tensor) -> bool:
    """Whether tensors like x are served by the Triton twins.

    Raises:
        ValueError: CRYSFORGE_KERNELS is unknown, or asks for what cannot run here.
    """
    if x.dtype not in _DTYPES:
        return False
    choice = _forced or os.environ.get("CRYSFORGE_KERNELS", "auto")
    return _choose(choice, x.device, x.dtype)


@functools.cache
def _choose(choice: str, device: torch.device, dtype: torch.dtype) -> bool:
    if choice not in CHOICES:
        raise ValueError(f"unknown CRYSFORGE_KERNELS={choice!r}: {nearest(choice, CHOICES)}")
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return False
    if importlib.util.find_spec("triton") is None:
        if choice == "triton":
            raise ValueError("CRYSFORGE_KERNELS=triton, but Triton is not installed")
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        if choice == "triton":
            raise ValueError(
                f"CRYSFORGE_KERNELS=triton on {device.type} needs Triton's interpreter: "
                "set TRITON_INTERPRET=1"
            )
        return False
    for module in _MODULES:
        importlib.import_module(f"crysforge.models.kernels.{module}")
    return choice == "triton" or _passes(device, dtype)


def _passes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the twins run on the device and agree with the definitions there."""
    trial = importlib.import_module("crysforge.models.kernels.self_test")
    try:
        trial.check(device, dtype)
    except Exception as failure:  # a compiler's errors are of many types
        reason = str(failure).strip().splitlines() or [type(failure).__name__]
        logging.getLogger(__name__).warning(
            "the Triton kernels are not used on %s (%s): %s", device, dtype, reason[0]
        )
        return False
    return True
