"""Files that are whole or absent: atomic writes, and safetensors read with care."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def write_text(path: Path, text: str) -> None:
    """Replaces the file's content in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Replaces the file by readable JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """JSON from a file; ValueError names the file if it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file and waits until it is on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors from a safetensors file, on the CPU; ValueError names a missing or broken file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Strict load with errors a user can act on.

    Raises:
        ValueError: names that are missing or not expected, or a shape that differs; `source` says
            where the tensors are from.
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
    module.load_state_dict(dict(tensors))


def remove_tree(path: Path) -> None:
    """Deletes a directory, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
