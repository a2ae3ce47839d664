"""Tensors in files: written whole or not at all, read with care; and which code this is."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crysforge import __version__
from crysforge.datapipe.common.files import replacing_by_name
from crysforge.trainer.base.safe_read import check_tensor_file


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replaces a safetensors file in one step, when it is on disk. Raises OSError if it cannot."""
    whole = {k: v.contiguous() for k, v in tensors.items()}
    with replacing_by_name(path) as temporary:
        try:
            save_file(whole, temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:  # what it makes of a full disk
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else str(error), str(path)) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors from a safetensors file, on the CPU; ValueError names a file that is missing, broken,
    a pickle, or a link out of its directory."""
    check_tensor_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    except RuntimeError:  # torch's word for a file that has gone since
        if path.is_file():
            raise
        raise ValueError(f"{path} was deleted while it was read") from None


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Strict load with errors a user can act on.

    Raises:
        ValueError: names that are missing or not expected, or a shape or type that differs;
            `source` says where the tensors are from.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"{source} is from another model: it lacks {missing[:3] or 'nothing'} and has "
            f"{extra[:3] or 'nothing'} beyond what this one expects"
        )
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise ValueError(
                f"{source} is from another model: {name} is {list(tensors[name].shape)} there "
                f"and {list(value.shape)} here"
            )
        if value.dtype != tensors[name].dtype:
            raise ValueError(
                f"{source} is from another model: {name} is {tensors[name].dtype} there and "
                f"{value.dtype} here"
            )
    module.load_state_dict(dict(tensors))


def copied_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state on the CPU, each name with a copy of its own (shared weights too), as
    `save_tensors` takes it."""
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}


@functools.cache
def code_version() -> Mapping[str, str]:
    """What the code is: package version, hash of the sources, and the git commit if there is one;
    as at the first call."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("datapipe", "models", "trainer", "launch"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    version = {"version": __version__, "sources": digest.hexdigest()[:16]}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"],
            cwd=root, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
        top, _, commit = git.stdout.strip().partition("\n")
        if git.returncode == 0 and Path(top) == root:  # not of a project that it is installed in
            version["commit"] = commit
    return version
