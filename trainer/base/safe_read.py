"""Reading the tensors of a stranger, and building what he describes: no code runs, and nothing is
larger than it says. Values are read by datapipe/common/safe_read.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from crysforge.datapipe.common.places import own_file

MAX_HEADER = 1 << 24
"""Bytes of the longest header of a safetensors file; one tensor takes about a hundred."""
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
"""Names of files that run code when they are loaded, or may."""


def check_tensor_file(path: Path) -> None:
    """Looks at the first bytes of a file of tensors, before anything of it is read.

    Raises:
        ValueError: missing, a link that leads elsewhere, a pickle, or no safetensors file.
    """
    size = own_file(path).stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
    header = int.from_bytes(start, "little")
    cut_off = len(start) < 8 or header > size - 8
    # One in 32 good files starts with 0x80 too, but then states a length that fits.
    if cut_off and (start[:1] == b"\x80" or start[:4] == b"PK\x03\x04"):
        raise ValueError(
            f"{path} is not a readable safetensors file but a pickle, which may run code when it "
            "is loaded: ask for the model as safetensors"
        )
    if cut_off:
        raise ValueError(f"{path} is not a readable safetensors file, or is cut off: get it again")
    if header > MAX_HEADER:
        raise ValueError(f"{path} claims a header of {header} bytes: no model has one so long")


@contextmanager
def at_most(numbers: int, source: str) -> Iterator[None]:
    """Modules built inside hold at most so many numbers (and as much again for tables that are not
    saved): a config cannot ask for more memory than the weights beside it take.

    Raises:
        ValueError: the module is larger, or cannot be built; `source` names what describes it.
    """
    limit, held = 2 * numbers + (1 << 16), 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal held
        held += 0 if tensor is None else tensor.numel()
        if held > limit:
            raise ValueError(f"{source} describes a larger model than the {numbers} numbers there")

    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # a number that is no width, a memory that does not suffice
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{source} describes no model: {reason[:200]}") from error
    finally:
        for hook in hooks:
            hook.remove()
