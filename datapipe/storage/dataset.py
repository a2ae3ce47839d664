"""A data set opened for reading: WebDataset tars of crystals beside an index."""

from __future__ import annotations

import copy
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import safetensors.numpy as safetensors
from safetensors import SafetensorError

from crysforge.datapipe.crystals.crystal import MAX_LABEL, BadCrystal, Crystal
from crysforge.datapipe.storage.cache import open_shard
from crysforge.datapipe.storage.manifest import SPLITS, Manifest
from crysforge.datapipe.storage.plain_tar import PlainEntries
from crysforge.datapipe.storage.record import (
    COLUMNS,
    FOLD_COLUMNS,
    INDEX,
    Tensors,
    decode,
    decode_all,
    encode,
)
from crysforge.datapipe.storage.remote import DEFAULT, Access, join_path, read_file
from crysforge.datapipe.storage.writer import DatasetWriter

__all__ = ["INDEX", "SPLITS", "Dataset", "DatasetWriter", "Manifest", "decode", "encode"]


Record = tuple[int, Crystal | BadCrystal, Tensors]
"""Item, its crystal or what is wrong with it, and all tensors of its record."""


class Dataset:
    """A data set opened for reading: its manifest and what the index knows of every crystal.

    Crystals have item numbers 0..N-1 in shard order (train, then val, then test).

    Attributes:
        atoms: [N] int32, atoms per cell. volume: [N] float32, cell volume in Å³.
        targets: [N, T] float64 in physical units, NaN where missing.
        fold: the fold whose crystals are the test split, see `with_fold`.
    """

    def __init__(
        self,
        root: str,
        manifest: Manifest,
        index: Mapping[str, np.ndarray],
        access: Access = DEFAULT,
    ) -> None:
        self.root, self.manifest, self.access = root, manifest, access
        self.names = list(manifest.targets)
        self.atoms, self.volume, self.targets = index["atoms"], index["volume"], index["targets"]
        self._offset, self._crc32 = index["offset"], index["crc32"]
        self._tested_in, self._validates = index.get("fold"), index.get("validates")
        self.fold: int | None = None
        self._first = np.cumsum([0, *(s.count for s in manifest.shards)])
        sizes = [manifest.splits[s] for s in SPLITS]
        self._start = dict(zip(SPLITS, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))

    @classmethod
    def open(cls, root: str | os.PathLike, access: Access = DEFAULT) -> Dataset:
        """The data set at `root` (a path or URL, see `datapipe.storage.remote`).

        Raises:
            ValueError: not a data set, its manifest or index is damaged, or it cannot be reached.
        """
        manifest = Manifest.load(root, access)

        url = join_path(root, INDEX)

        most = largest_index(manifest)

        def check(data: bytes) -> None:
            if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
                raise ValueError(f"{url} is damaged: its hash is not the manifest's")

        try:
            sound = lambda path: check(path.read_bytes())  # noqa: E731
            data = read_file(root, INDEX, access, sound, most)
        except FileNotFoundError:
            raise ValueError(f"{url} is missing: the data set is damaged") from None
        except OSError as error:
            raise ValueError(f"{root}: {error}") from None
        check(data)
        try:
            index = safetensors.load(data)
        except SafetensorError as error:
            raise ValueError(f"{url} is damaged: {error}") from None
        if problem := misfit(index, manifest):
            raise ValueError(f"{url} does not belong to the manifest beside it: {problem}")
        return cls(os.fspath(root), manifest, index, access)

    def through(self, access: Access) -> Dataset:
        """The same data set, its shards reached in another way."""
        other = copy.copy(self)
        other.access = access
        return other

    def __len__(self) -> int:
        return len(self.atoms)

    @property
    def folds(self) -> int:
        """Number of folds; 0: it has the splits train, val, test."""
        return self.manifest.folds.get("count", 0)

    def with_fold(self, fold: int | None) -> Dataset:
        """The same data set with the crystals of a fold as its test split.

        Raises:
            ValueError: there is no such fold, or there are folds and none is chosen.
        """
        if not self.folds and fold is not None:
            raise ValueError(
                f"fold={fold}, but {self.root} has no folds: prepare it with folds=5, or leave fold"
            )
        if self.folds and (fold is None or not 0 <= fold < self.folds):
            raise ValueError(
                f"{self.root} has {self.folds} folds: give fold=0 to {self.folds - 1}, the one to "
                f"test on{'' if fold is None else f', not {fold}'}"
            )
        other = copy.copy(self)
        other.fold = fold
        return other

    def fold_of(self, item: int) -> tuple[int, int] | None:
        """The fold that tests an item, and a bit for each in which it validates; None where the
        data set has none."""
        if self._tested_in is None or self._validates is None:
            return None
        return int(self._tested_in[item]), int(self._validates[item])

    def split_items(self, split: str) -> np.ndarray:
        """Item numbers of a split, [n] int64 ascending; empty if it has no crystals. Of a data set
        with folds, those of the chosen fold; where none is chosen, all are in train.

        Raises:
            ValueError: an unknown split, or one that no fold is chosen for.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: valid: {', '.join(SPLITS)}")
        if self.fold is None and self.folds and split != "train":
            self.with_fold(None)  # says what to give
        if self.fold is None or self._tested_in is None or self._validates is None:
            return self.stored_items(split)
        validates = (self._validates >> np.uint32(self.fold)) & 1 == 1
        test = self._tested_in == self.fold
        chosen = {"train": ~test & ~validates, "val": validates, "test": test}
        return np.flatnonzero(chosen[split])

    def stored_items(self, split: str) -> np.ndarray:
        """Item numbers of the crystals that lie in the shards of a split, [n] int64 ascending."""
        return self._start[split] + np.arange(self.manifest.splits[split])

    def targets_of(self, name: str) -> np.ndarray:
        """Labels of one target for all items, [N] float64, NaN where missing."""
        if name not in self.names:
            known = ", ".join(self.names) or "none"
            raise ValueError(
                f"{self.root} has no target {name!r}: it has {known}; prepare it again with "
                "targets=[…] (and labels=TABLE, where labels are in a table of their own)"
            )
        return self.targets[:, self.names.index(name)]

    def shard_of(self, items: np.ndarray) -> np.ndarray:
        """Number of the shard that holds each item."""
        return np.searchsorted(self._first, items, side="right") - 1

    def where(self, item: int) -> str:
        """Shard and entry of an item, for messages."""
        shard = int(self.shard_of(np.asarray(item)))
        return f"{self.manifest.shards[shard].name} entry {item - self._first[shard]}"

    def read(self, items: Iterable[int]) -> Iterator[tuple[int, Crystal | BadCrystal]]:
        """The crystals of `items`, in that order; each ascending run within a shard is one
        sequential read. What cannot be read comes as a `BadCrystal` that says why.

        Raises:
            ValueError: a shard cannot be opened.
        """
        for item, crystal, _ in self.read_records(items):
            yield item, crystal

    def read_records(self, items: Iterable[int]) -> Iterator[Record]:
        """As `read`, each with all tensors of its record.

        Raises:
            ValueError: a shard cannot be opened.
        """
        wanted = np.asarray(list(items), dtype=np.int64)
        shards = self.shard_of(wanted)
        breaks = 1 + np.flatnonzero((np.diff(wanted) <= 0) | (np.diff(shards) != 0))
        for run in np.split(wanted, breaks) if len(wanted) else ():
            todo = run.tolist()
            while todo:  # after damage, the index says where the next entry starts
                done = 0
                for found in self._scan(todo):
                    yield found
                    done += 1
                if done < len(todo):
                    yield todo[done], BadCrystal(f"{self.where(todo[done])} is lost in damage"), {}
                todo = todo[done + 1 :]

    def _scan(self, items: list[int]) -> Iterator[Record]:
        """Reads ascending items of one shard up to the first that is not where it should be."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        shard = self.manifest.shards[int(self.shard_of(np.asarray(items[0])))]
        first = self._start[shard.split]
        try:
            stream = open_shard(self.root, shard, self.access)
        except OSError as error:
            raise ValueError(
                f"cannot open shard {join_path(self.root, shard.name)}: {error}"
            ) from None
        with stream:
            stream.seek(int(self._offset[items[0]]))
            source = [{"url": shard.name, "stream": PlainEntries(stream)}]
            files = tar_file_expander(source, handler=_stop)
            todo = iter(items)
            item = next(todo)
            for sample in group_by_keys(files, handler=_stop):
                key = sample["__key__"]
                number = first + int(key) if key.isdecimal() else -1
                if number < item:
                    continue
                if number > item:
                    return
                yield item, *self._decode(item, sample.get("safetensors", b""))
                item = next(todo, -1)
                if item < 0:
                    return

    def _decode(self, item: int, data: bytes) -> tuple[Crystal | BadCrystal, Tensors]:
        if zlib.crc32(data) != self._crc32[item]:
            return BadCrystal(f"{self.where(item)} is damaged: its checksum is not the index's"), {}
        try:
            return decode_all(data, self.names)
        except BadCrystal as error:
            return BadCrystal(f"{self.where(item)}: {error}"), {}


def columns_of(manifest: Manifest) -> Mapping[str, str]:
    """Arrays of the index and their typecodes."""
    return COLUMNS | (FOLD_COLUMNS if manifest.folds else {})


def largest_index(manifest: Manifest) -> int:
    """Bytes that the index of a manifest's crystals has at most."""
    codes = columns_of(manifest).values()
    row = sum(np.dtype(code).itemsize for code in codes) + 8 * len(manifest.targets)
    return row * sum(manifest.splits.values()) + (1 << 20)


def misfit(index: Mapping[str, np.ndarray], manifest: Manifest) -> str:
    """Why an index is not one of the crystals that a manifest tells of; empty if it is."""
    count = sum(manifest.splits.values())
    columns = columns_of(manifest)
    shapes = dict.fromkeys(columns, (count,)) | {"targets": (count, len(manifest.targets))}
    types = {name: np.dtype(code) for name, code in columns.items()}
    if {name: (array.shape, array.dtype) for name, array in index.items()} != {
        name: (shapes[name], types[name]) for name in columns
    }:
        held = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in sorted(index.items()))
        return f"it holds {held}"
    sound = {
        "atoms": index["atoms"] > 0,
        "volume": np.isfinite(index["volume"]) & (index["volume"] > 0),
        "offset": (index["offset"] >= 0) & (index["offset"] < 2**50),
        "targets": ~(np.abs(index["targets"]) > MAX_LABEL).any(axis=1),
    }
    if manifest.folds:
        sound |= _sound_folds(index["fold"], index["validates"], manifest.folds["count"])
    wrong = [name for name, rows in sound.items() if not rows.all()]
    return f"{wrong[0]} of a crystal is out of range" if wrong else ""


def _sound_folds(test: np.ndarray, validates: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Where crystals are tested in a fold that there is, and validate in others alone."""
    own = (validates >> np.clip(test, 0, 31).astype(np.uint32)) & 1
    return {
        "fold": (test >= 0) & (test < count),
        "validates": (validates < 2**count) & (own == 0),
    }


def _stop(error: Exception) -> bool:
    """WebDataset handler: damage ends the scan; `Dataset.read` goes on behind it."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error  # the medium failed, not the record
    return False
