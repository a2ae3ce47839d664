"""One crystal as bytes, and what the index of a data set says of each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.numpy as safetensors

from crysforge.datapipe.crystals.crystal import MAX_LABEL, MAX_Z, BadCrystal, Crystal

Tensors = dict[str, np.ndarray]
"""By name."""

_CRYSTAL = ("numbers", "frac_coords", "lattice", "targets")
_TYPES = {
    name: np.dtype(code)
    for name, code in {"U8": "u1", "U16": "<u2", "U32": "<u4", "F32": "<f4", "F64": "<f8"}.items()
}
"""Types of tensors in records, by their names in safetensors."""

_NO_RECORD = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Exceptions that a malformed header can raise."""

INDEX = "index.safetensors"
COLUMNS = {"atoms": "i", "volume": "f", "offset": "q", "crc32": "I", "targets": "d"}
"""Arrays of the index: typecodes of `array` and numpy alike."""
FOLD_COLUMNS = {"fold": "b", "validates": "I"}
"""More of them, of a data set with folds: the fold that tests each crystal, and a bit for each in
which it validates."""


def encode(
    crystal: Crystal, targets: Sequence[str], more: Mapping[str, np.ndarray] | None = None
) -> bytes:
    """One crystal as safetensors bytes: `numbers` uint8 [n], `frac_coords` float64 [n, 3],
    `lattice` float64 [3, 3] (rows, Å), `targets` float64 [T] (NaN: missing), metadata `id`; and
    whatever more tensors are to lie beside them."""
    labels = [crystal.targets.get(name, np.nan) for name in targets]
    tensors: dict[str, np.ndarray] = {
        "numbers": np.asarray(crystal.numbers, dtype=np.uint8),
        "frac_coords": np.ascontiguousarray(crystal.frac_coords, dtype=np.float64),
        "lattice": np.ascontiguousarray(crystal.lattice, dtype=np.float64),
        "targets": np.array(labels, dtype=np.float64),
        **{name: np.ascontiguousarray(array) for name, array in (more or {}).items()},
    }
    return safetensors.save(tensors, metadata={"id": crystal.id})


def decode(data: bytes, targets: Sequence[str]) -> Crystal:
    """The crystal in `encode`'s bytes.

    Raises:
        BadCrystal: these are not the bytes of a sound crystal with `len(targets)` labels.
    """
    return decode_all(data, targets)[0]


def decode_all(data: bytes, targets: Sequence[str]) -> tuple[Crystal, Tensors]:
    """The crystal in `encode`'s bytes, and all tensors beside it; they are views of the bytes.

    Raises:
        BadCrystal: these are not the bytes of a sound crystal with `len(targets)` labels.
    """
    try:
        id, tensors = _views(data)
        z, frac, cell, labels = (tensors.pop(name) for name in _CRYSTAL)
    except _NO_RECORD as error:
        raise BadCrystal(f"not a crystal record: {type(error).__name__}: {error}") from None
    n = len(z) if z.ndim == 1 else 0
    shapes = [z.shape, frac.shape, cell.shape, labels.shape]
    types = [z.dtype, frac.dtype, cell.dtype, labels.dtype]
    if n == 0 or shapes != [(n,), (n, 3), (3, 3), (len(targets),)]:
        raise BadCrystal(f"{id}: wrong shapes {[list(s) for s in shapes]}")
    if types != [np.uint8, np.float64, np.float64, np.float64]:
        raise BadCrystal(f"{id}: wrong types {[str(t) for t in types]}")
    if z.min() < 1 or z.max() > MAX_Z:
        raise BadCrystal(f"{id}: atomic numbers must be 1..{MAX_Z}")
    if not (np.isfinite(frac).all() and np.isfinite(cell).all()):
        raise BadCrystal(f"{id}: coordinates or lattice are not finite numbers")
    if (np.abs(labels) > MAX_LABEL).any():
        raise BadCrystal(f"{id}: a label is beyond ±{MAX_LABEL:g}: {labels.tolist()}")
    if not np.linalg.det(cell) > 0:
        raise BadCrystal(f"{id}: the cell is flat or left-handed")
    crystal = Crystal(id, z, frac, cell, dict(zip(targets, labels.tolist(), strict=True)))
    return crystal, tensors


def _views(data: bytes) -> tuple[str, Tensors]:
    """Id and tensors in safetensors bytes. The library reads the header once for the metadata and
    once for the tensors, and copies these; that takes three times as long."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start].decode())
    id = header.pop("__metadata__")["id"]
    if not isinstance(id, str):
        raise TypeError(f"the id is {id!r}")
    tensors = {}
    for name, entry in header.items():
        shape, at = entry["shape"], start + entry["data_offsets"][0]
        # Not np.ndarray(…, buffer=data), which takes a negative offset as it is.
        flat = np.frombuffer(data, _TYPES[entry["dtype"]], math.prod(shape), at)
        tensors[name] = flat if len(shape) == 1 else flat.reshape(shape)
    return id, tensors
