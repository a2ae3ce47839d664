"""Lists of ids out of the pickles in which some published splits are, without running them.

An unpickler that knows lists, dicts, strings and numbers. Whatever else a pickle names is refused
before it is looked up, so nothing of it is imported or called; arrays of numpy, of which structures
are made, are passed over unread.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from crysforge.datapipe.common.safe_read import read_named

MAX_PICKLE = 1 << 30
"""Bytes of the longest file."""
IDS = ("id", "jid", "material_id", "task_id", "file_id")
"""Keys under which an entry may have its id."""
_NUMBER = "biuf"
"""Kinds of numbers, as numpy names them."""


class _Type:
    """Stands for a numpy type: its code."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = code if isinstance(code, str) else ""

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
        self.order = order if order in ("<", ">", "|", "=") else "<"

    order = "<"


class _Unread:
    """Stands for an array."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _scalar(kind: Any, data: Any = b"") -> float | int | bool:
    """A number of numpy from its bytes."""
    if isinstance(kind, _Type) and kind.code[:1] in _NUMBER and isinstance(data, bytes):
        found = np.frombuffer(data, np.dtype(kind.order + kind.code))
        if len(found) == 1:
            return found[0].item()
    raise ValueError("a number of numpy that is none")


def _bytes(text: Any, codec: Any) -> bytes:
    """How pickles of protocol 2 write bytes."""
    if isinstance(text, str) and codec == "latin1":
        return text.encode("latin1")
    raise ValueError("bytes in another form than pickles have")


_KNOWN: dict[tuple[str, str], Any] = {("numpy", "dtype"): _Type, ("numpy", "ndarray"): _Unread}
_KNOWN[("_codecs", "encode")] = _bytes
for _core in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_core}.multiarray", "scalar"] = _scalar
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _Unread
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _Unread


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ValueError(f"it asks for {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it asks for something that lies elsewhere")


def pickled_ids(path: Path) -> list[str]:
    """The ids of a pickled list: of strings or numbers, or of dicts that have one under `id`, `jid`
    or the like.

    Raises:
        ValueError: anything else, or a pickle that holds more than lists, dicts, strings and
            numbers.
    """
    try:
        found = _Plain(io.BytesIO(read_named(str(path), "split_ids", MAX_PICKLE))).load()
    except Exception as error:  # a broken pickle fails in any way
        raise ValueError(
            f"{path}: of a pickle only lists, dicts, strings and numbers are read: {error}"
        ) from None
    if not isinstance(found, list):
        raise ValueError(f"{path} holds no list")
    ids = [_id(entry) for entry in found]
    if None in ids:
        raise ValueError(
            f"{path}: entry {ids.index(None) + 1} has no id: it is neither a string nor a number, "
            f"nor a dict with one under {', '.join(IDS)}"
        )
    return [str(id) for id in ids]


def _id(entry: Any) -> str | int | None:
    if isinstance(entry, dict):
        entry = next((entry[key] for key in IDS if key in entry), None)
    return entry if isinstance(entry, (str, int)) and not isinstance(entry, bool) else None
