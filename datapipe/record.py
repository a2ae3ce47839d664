"""One crystal as bytes, and what the index of a data set says of each."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import safetensors.numpy as safetensors
from safetensors import SafetensorError

from datapipe.crystal import BadCrystal, Crystal
from datapipe.schema import MAX_Z

INDEX = "index.safetensors"
COLUMNS = {"atoms": "i", "volume": "f", "offset": "q", "crc32": "I", "targets": "d"}
"""Arrays of the index: typecodes of `array` and numpy alike."""


def encode(crystal: Crystal, targets: Sequence[str]) -> bytes:
    """One crystal as safetensors bytes: `numbers` uint8 [n], `frac_coords` float64 [n, 3],
    `lattice` float64 [3, 3] (rows, Å), `targets` float64 [T] (NaN: missing), metadata `id`."""
    labels = [crystal.targets.get(name, np.nan) for name in targets]
    tensors: dict[str, np.ndarray] = {
        "numbers": np.asarray(crystal.numbers, dtype=np.uint8),
        "frac_coords": np.ascontiguousarray(crystal.frac_coords, dtype=np.float64),
        "lattice": np.ascontiguousarray(crystal.lattice, dtype=np.float64),
        "targets": np.array(labels, dtype=np.float64),
    }
    return safetensors.save(tensors, metadata={"id": crystal.id})


def decode(data: bytes, targets: Sequence[str]) -> Crystal:
    """The crystal in `encode`'s bytes.

    Raises:
        BadCrystal: these are not the bytes of a sound crystal with `len(targets)` labels.
    """
    try:
        tensors = safetensors.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        id = header["__metadata__"]["id"]
        z, frac, cell, labels = (
            tensors[k] for k in ("numbers", "frac_coords", "lattice", "targets")
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
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
    if not (np.isfinite(frac).all() and np.isfinite(cell).all()) or np.isinf(labels).any():
        raise BadCrystal(f"{id}: coordinates, lattice or labels are not finite numbers")
    if not np.linalg.det(cell) > 0:
        raise BadCrystal(f"{id}: the cell is flat or left-handed")
    return Crystal(id, z, frac, cell, dict(zip(targets, labels.tolist(), strict=True)))
