"""Triton twins of the operations that models are made of.

`enable(device, dtypes)` is called once by whoever places a model on a device. A GPU takes the twins
where Triton is installed and a small test on the device agrees with the plain definitions, forward
and backward; everything else takes the definitions. `CRYSFORGE_KERNELS=torch` or `=triton`
overrides the choice (on a CPU, `triton` needs Triton's interpreter: `TRITON_INTERPRET=1`).

Each kernel writes every output once and sums in fp32 in a fixed order: no atomics, equal bits in
every run. Matrix products are left to the vendor's library.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from crysforge.datapipe.common.names import nearest
from crysforge.models.ops import dispatch

CHOICES = ("auto", "torch", "triton")
MODULES = ("segments", "comformer", "matformer", "modulation")

log = logging.getLogger(__name__)


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Within it "torch" or "triton" serves every tensor. Not for several threads."""
    if choice == "triton":
        register()
    with dispatch.forced(choice):
        yield


def register() -> None:
    """Imports the kernels, which makes them the twins of their operations."""
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")


def enable(device: torch.device, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> None:
    """Has the twins serve a device from now on, if they can and may.

    Args:
        dtypes: of the tensors that the model will see; others take the plain definitions.

    Raises:
        ValueError: CRYSFORGE_KERNELS is unknown, or asks for what cannot run here.
    """
    device = torch.empty(0, device=device).device  # with its number
    dispatch.enabled -= {pair for pair in dispatch.enabled if pair[0] == device}
    for dtype in dtypes:
        if dtype in dispatch.DTYPES and _usable(dispatch.chosen(), device, dtype):
            dispatch.enabled.add((device, dtype))


@functools.cache
def _usable(choice: str, device: torch.device, dtype: torch.dtype) -> bool:
    if choice not in CHOICES:
        raise ValueError(f"unknown {dispatch.ENVIRONMENT}={choice!r}: {nearest(choice, CHOICES)}")
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return False
    if importlib.util.find_spec("triton") is None:
        if choice == "triton":
            raise ValueError(f"{dispatch.ENVIRONMENT}=triton, but Triton is not installed")
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        raise ValueError(
            f"{dispatch.ENVIRONMENT}=triton on {device.type} needs Triton's interpreter: "
            "set TRITON_INTERPRET=1"
        )
    register()
    return choice == "triton" or _passes(device, dtype)


def _passes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the twins run on the device and agree with the definitions there."""
    test = importlib.import_module(f"{__name__}.self_test")
    try:
        test.check(device, dtype)
    except Exception as failure:  # a compiler's errors are of many types
        reason = str(failure).strip().splitlines() or [type(failure).__name__]
        log.warning("the Triton kernels are not used on %s (%s): %s", device, dtype, reason[0])
        return False
    return True
