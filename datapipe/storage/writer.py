"""Writes a data set: WebDataset tars, the index and, last, the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy as safetensors

from crysforge.datapipe.common.checked import Line, Name, checked
from crysforge.datapipe.common.claims import LOCK, claim_directory, empty_directory
from crysforge.datapipe.common.files import DISK_FULL, remove_tree, sync_directory, write_bytes
from crysforge.datapipe.common.safe_names import check_names
from crysforge.datapipe.crystals.crystal import MAX_LABEL, MAX_Z, Crystal
from crysforge.datapipe.storage.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    SPLITS,
    Manifest,
    Shard,
    Target,
)
from crysforge.datapipe.storage.record import COLUMNS, FOLD_COLUMNS, INDEX, Tensors, encode


class _OpenShard:
    """A tar that is being written: hashes what passes through."""

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter

        self.name = path.name
        self._file = open(path, "xb")  # noqa: SIM115  (closed by `close` or `abort`)
        self._digest = hashlib.sha256()
        self.count = self.bytes = 0
        self.tar = TarWriter(self, encoder=False, mtime=0)

    def write(self, data: bytes) -> int:  # what the tar library calls
        if self._file.closed:  # it flushes once more when an aborted shard is collected
            return len(data)
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def add(self, key: str, data: bytes) -> int:
        """Adds an entry; returns the byte where it starts."""
        offset = self.tar.tarstream.offset
        self.tar.write({"__key__": key, "safetensors": data})
        self.count += 1
        return offset

    def close(self, split: str) -> Shard:
        try:
            self.tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return Shard(self.name, split, self.count, self.bytes, self._digest.hexdigest())

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class DatasetWriter:
    """Writes a data set that appears at `root` complete, or not at all.

        with DatasetWriter("data/mp20", ["e_form"], {"e_form": "eV/atom"}) as writer:
            for split, crystal in crystals:
                writer.add(split, crystal)
            manifest = writer.finish({"source": "mp20.csv"})

    Everything is written to the sibling directory `.NAME.partial`, which a lock guards, and moved
    in one rename. Leaving the block without `finish` discards it; so does the next writer with
    what a killed one left.

    Args:
        root: local directory that does not exist or is empty.
        targets: names of the labels to keep, in the order of the index.
        units: unit per target.
        shard_size: crystals per tar.
        folds: number of folds; then all crystals go to train, each with the fold it is in.

    Raises:
        ValueError: `root` holds files already, another process is writing to it, or a target has
            a name that none may have.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        targets: Sequence[str],
        units: Mapping[str, str] | None = None,
        shard_size: int = 1000,
        folds: int = 0,
    ) -> None:
        units = dict(units or {})
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        check_names(targets)
        if len(set(targets)) < len(targets) or not set(units) <= set(targets):
            raise ValueError(f"targets {list(targets)} must be unique and name every unit {units}")
        checked(list[Name], list(targets), "targets")
        checked(dict[Name, Line | None], units, "units")
        self.root = Path(root).resolve()
        self.targets, self.units, self.shard_size = list(targets), units, shard_size
        self.folds, self._columns = folds, COLUMNS | (FOLD_COLUMNS if folds else {})
        self.directory = self.root.parent / f".{self.root.name}.partial"
        """Where files that should lie beside the shards (`dropped.csv`) are put before `finish`."""
        self._ids: set[str] = set()
        self._elements = np.zeros(MAX_Z + 1, dtype=bool)
        self._open: dict[str, _OpenShard] = {}
        self._shards: dict[str, list[Shard]] = {s: [] for s in SPLITS}
        self._index: dict[str, dict[str, array]] = {
            s: {k: array(code) for k, code in self._columns.items()} for s in SPLITS
        }
        self._refuse_used_root()
        self._claim()

    def _refuse_used_root(self) -> None:
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is a file: give a new directory for the data set")
        if os.path.ismount(self.root):
            raise ValueError(f"{self.root} is a mount point: give a directory below it")
        if any(self.root.iterdir()):
            kind = "a data set" if (self.root / MANIFEST).exists() else "files"
            raise ValueError(f"{self.root} already holds {kind}: give another or remove it")

    def _claim(self) -> None:
        """Takes the partial directory for this process and empties it."""
        busy = f"another process is writing {self.root}: let it finish"
        self._lock = claim_directory(self.directory, busy)
        try:
            self._refuse_used_root()
        except ValueError:
            self._discard()
            raise
        empty_directory(self.directory)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._discard()
        if isinstance(error, OSError) and error.errno in DISK_FULL:  # it may not say where
            raise OSError(error.errno, error.strerror, str(self.root)) from error

    def _discard(self) -> None:
        for shard in self._open.values():
            shard.abort()
        if self._lock.held:
            remove_tree(self.directory)
            self._lock.release()

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self,
        split: str,
        crystal: Crystal,
        more: Tensors | None = None,
        fold: tuple[int, int] | None = None,
    ) -> None:
        """Appends a crystal to a split, with more tensors in its record if there are any.

        Args:
            fold: of a data set with folds: the one that tests it, and a bit for each in which it
                validates.

        Raises:
            ValueError: unknown split, an id that was added before, a label beyond `MAX_LABEL`.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: valid: {', '.join(SPLITS)}")
        if crystal.id in self._ids:
            raise ValueError(f"duplicate id {crystal.id!r}: ids must be unique in a data set")
        labels = [float(crystal.targets.get(name, np.nan)) for name in self.targets]
        if (np.abs(labels) > MAX_LABEL).any():
            raise ValueError(
                f"{crystal.id}: a label is beyond ±{MAX_LABEL:g}: {dict(crystal.targets)}"
            )
        shard = self._open.get(split)
        if shard is None:
            number = len(self._shards[split])
            shard = _OpenShard(self.directory / f"{split}-{number:06d}.tar")
            self._open[split] = shard
        index, data = self._index[split], encode(crystal, self.targets, more)
        index["offset"].append(shard.add(f"{len(index['atoms']):09d}", data))
        index["atoms"].append(len(crystal))
        index["volume"].append(crystal.volume)
        index["crc32"].append(zlib.crc32(data))
        index["targets"].extend(labels)
        if self.folds:
            assert fold is not None and split == "train"
            index["fold"].append(fold[0])
            index["validates"].append(fold[1])
        self._ids.add(crystal.id)
        self._elements[crystal.numbers] = True
        if shard.count == self.shard_size:
            self._shards[split].append(self._open.pop(split).close(split))

    def finish(
        self,
        provenance: Mapping[str, Any],
        graphs: Mapping[str, dict[str, Any]] | None = None,
    ) -> Manifest:
        """Completes the data set, moves it to `root` and returns its manifest, which has the
        `provenance` and says whose `graphs` are stored with the crystals.

        Raises:
            ValueError: no crystal was added, or another writer was faster.
        """
        if not self._ids:
            raise ValueError(f"no crystal to write to {self.root}")
        for split in list(self._open):
            self._shards[split].append(self._open.pop(split).close(split))
        parts = {s: {k: np.array(v) for k, v in self._index[s].items()} for s in SPLITS}
        for columns in parts.values():
            columns["targets"] = columns["targets"].reshape(
                len(columns["atoms"]), len(self.targets)
            )
        data = safetensors.save(
            {k: np.concatenate([parts[s][k] for s in SPLITS]) for k in self._columns}
        )
        write_bytes(self.directory / INDEX, data)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            created_by=_created_by(),
            splits={s: len(parts[s]["atoms"]) for s in SPLITS},
            shards=[shard for s in SPLITS for shard in self._shards[s]],
            index_sha256=hashlib.sha256(data).hexdigest(),
            elements=np.flatnonzero(self._elements).tolist(),
            targets={
                name: _describe(
                    {s: parts[s]["targets"][:, i] for s in SPLITS}, self.units.get(name)
                )
                for i, name in enumerate(self.targets)
            },
            provenance=dict(provenance),
            graphs=dict(graphs or {}),
            folds={"count": self.folds} if self.folds else {},
        )
        manifest.check()
        text = json.dumps(asdict(manifest), indent=1, allow_nan=False, ensure_ascii=False)
        write_bytes(self.directory / MANIFEST, text.encode())
        if not self._lock.held:  # frozen for too long, where there are no locks
            raise ValueError(f"another process has taken over {self.root}: let it finish")
        try:
            os.rename(self.directory, self.root)
        except OSError as error:
            self._discard()
            raise ValueError(f"cannot move the data set to {self.root}: {error}") from None
        self._lock.moved(self.root / LOCK)
        sync_directory(self.root.parent)
        self._lock.release()
        return manifest


def _describe(labels: Mapping[str, np.ndarray], unit: str | None) -> Target:
    known = {split: values[~np.isnan(values)] for split, values in labels.items()}
    train = known["train"]
    return Target(
        unit=unit,
        mean=float(train.mean()) if len(train) else None,
        std=float(train.std()) if len(train) else None,
        labelled={split: len(values) for split, values in known.items()},
    )


def _created_by() -> str:
    try:
        return f"crysforge {version('crysforge')}"
    except PackageNotFoundError:
        return "crysforge (source tree)"
