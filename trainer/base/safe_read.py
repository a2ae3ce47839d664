"""Reading what a stranger may have written: nothing of it runs, and nothing of it can be larger or
elsewhere than it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

MAX_TEXT = 1 << 20
"""Bytes of the longest YAML or JSON file of a model."""
MAX_HEADER = 1 << 24
"""Bytes of the longest header of a safetensors file; one tensor takes about a hundred."""
MAX_DEPTH = 32
"""Levels of the deepest YAML file."""
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
"""Names of files that run code when they are loaded, or may."""


def own_file(path: Path) -> Path:
    """The path of a file, after checking that the file is where the path says.

    Raises:
        ValueError: it does not exist, is no regular file, or is a link that leads out of its
            directory.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError(
            f"{path} is a link out of its directory and is not followed: put a copy of the file in "
            "its place"
        )
    return path


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


def read_text(path: Path) -> str:
    """A small text file. Raises ValueError if it is missing, a link that leads elsewhere, longer
    than `MAX_TEXT` or no text."""
    size = own_file(path).stat().st_size
    if size > MAX_TEXT:
        raise ValueError(f"{path} has {size} bytes, a model's has at most {MAX_TEXT}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of plain values: mappings, lists, texts, numbers.

    Raises:
        ValueError: as `read_text`; tags (which make objects), aliases (which may stand for
            billions of values), nesting beyond `MAX_DEPTH`, or no mapping of names to values.
    """
    text = read_text(path)
    try:
        _check_events(path, text)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # of a number or date that is none
        named = str(path) in str(error)
        raise ValueError(str(error) if named else f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold a mapping of names to values")
    return values


def _check_events(path: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{path} has an alias (*{event.anchor}): write the value out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{path} has a tag ({event.tag}): it may hold plain values only")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"{path} is nested more than {MAX_DEPTH} levels deep")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ValueError as `read_text`, or if it holds none."""
    try:
        values = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


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
