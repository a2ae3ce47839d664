"""Files that are whole or absent: atomic writes, and safetensors read with care."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crysforge.models import __version__
from crysforge.trainer.base.safe_read import check_tensor_file


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Replaces the file's content in one step; `durable` waits until it is on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Replaces the file by readable JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n", durable)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file and waits until it is on disk. Raises OSError if it cannot."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; safetensors writes for the owner only
        whole = {k: v.contiguous() for k, v in tensors.items()}
        save_file(whole, temporary, dict(metadata) if metadata else None)
        temporary.chmod(mode)
    except SafetensorError as error:  # what it makes of a full disk
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from None
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


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


def remove_tree(path: Path) -> None:
    """Deletes a directory, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Waits until names in a directory (a rename) are on disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A directory that appears when the block ends: it is filled under another name beside, and of
    a block that fails nothing stays.

    Raises:
        ValueError: `path` exists.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists: choose another output")
    work = path.with_name(f".{path.name}.partial")
    remove_tree(work)
    work.mkdir(parents=True)
    try:
        yield work
        sync_directory(work)
        work.rename(path)
    except BaseException:
        remove_tree(work)
        raise
    sync_directory(path.parent)


def check_space(path: Path, size: int) -> None:
    """Raises OSError unless `size` bytes and a little more fit on the disk of `path`."""
    free = shutil.disk_usage(path).free
    if free < 1.05 * size + 2**24:
        raise OSError(
            errno.ENOSPC, f"{size / 1e9:.3g} GB to write, {free / 1e9:.3g} GB free", str(path)
        )


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


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
