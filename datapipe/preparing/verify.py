"""Checks a data set from end to end: hashes, counts, every record, and that index and manifest
agree with what is in the shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy as safetensors
from safetensors import SafetensorError
from tqdm import tqdm

from crysforge.datapipe.common.files import hash_of
from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.graphs.stored import StoredGraphs
from crysforge.datapipe.preparing.edit_configs import VerifyConfig
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage.dataset import INDEX, Dataset, largest_index, misfit
from crysforge.datapipe.storage.manifest import MANIFEST, SPLITS, Manifest
from crysforge.datapipe.storage.remote import local_path, open_file, read_file

_SAME = 1e-6
"""Relative difference up to which numbers of manifest and index are taken for equal to what they
were made of: the index has volumes in float32."""


def verify(config: VerifyConfig) -> Iterator[str]:
    """Every problem of a data set, one line each; nothing if it is sound.

    Raises:
        ValueError: it is no data set, or one of another schema version.
    """
    root = config.verify
    manifest = Manifest.load(root)
    dataset, problems = _open(root, manifest)
    yield from problems
    yield from _strays(root, manifest)
    yield from _graphs(manifest)[1]
    check = CheckShard(root, manifest, dataset)
    shards = range(len(manifest.shards))
    bar = tqdm(total=len(shards), desc="verifying", unit=" shards", disable=not config.progress)
    first: dict[str, str] = {}
    elements: set[int] = set()
    whole = dataset is not None
    with bar, Workers(check, config.workers) as workers:
        for result in workers.map(shards, chunk=1):
            bar.update()
            yield from result.problems
            whole &= not result.problems
            elements |= result.elements
            for id, where in result.ids:
                if first.setdefault(id, where) != where:
                    yield f"{where}: id {id!r} occurs before, in {first[id]}"
    if whole and sorted(elements) != manifest.elements:
        yield f"{MANIFEST}: elements are {sorted(elements)}, not {manifest.elements}"
    if dataset is not None:
        yield from _statistics(dataset)


def _open(root: str, manifest: Manifest) -> tuple[Dataset | None, list[str]]:
    """The data set, if its index can be used at all, and what is wrong with the index."""
    try:
        data = read_file(root, INDEX, most=largest_index(manifest))
        index = safetensors.load(data)
        if problem := misfit(index, manifest):
            return None, [f"{INDEX}: does not belong to the manifest: {problem}"]
    except (OSError, ValueError, SafetensorError) as error:
        return None, [f"{INDEX}: {error}"]
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        return Dataset(root, manifest, index), [f"{INDEX}: its hash is not the manifest's"]
    return Dataset(root, manifest, index), []


def _strays(root: str, manifest: Manifest) -> Iterator[str]:
    """Shards beside the data set that do not belong to it; of local directories."""
    local = local_path(root)
    if local is not None:
        known = {shard.name for shard in manifest.shards}
        for path in sorted(Path(local).glob("*.tar")):
            if path.name not in known:
                yield f"{path.name}: is not in the manifest"


def _graphs(manifest: Manifest) -> tuple[list[StoredGraphs], list[str]]:
    """The graphs that are stored with the crystals, and what is wrong with what is said of them."""
    stored, problems = [], []
    for key, values in manifest.graphs.items():
        try:
            spec: Any = values
            graph = StoredGraphs(GraphSpec(**spec))
        except (TypeError, ValueError) as error:
            problems.append(f"{MANIFEST}: graphs.{key} is no graph spec: {error}")
            continue
        if graph.key == key:
            stored.append(graph)
        else:
            problems.append(f"{MANIFEST}: graphs.{key} is not the key of its spec: bake it again")
    return stored, problems


@dataclass
class CheckedShard:
    """What is in a shard."""

    problems: list[str]
    ids: list[tuple[str, str]]
    """Id and place of every record."""
    elements: set[int]


class CheckShard:
    """Checks a shard, by its number; this is what worker processes do."""

    def __init__(self, root: str, manifest: Manifest, dataset: Dataset | None) -> None:
        self.root, self.manifest, self.dataset = root, manifest, dataset
        self.first = np.cumsum([0, *(s.count for s in manifest.shards)]).tolist()

    def __call__(self, number: int) -> CheckedShard:
        shard = self.manifest.shards[number]
        out = CheckedShard([], [], set())
        try:
            with open_file(self.root, shard.name, most=shard.bytes) as file:
                size = os.fstat(file.fileno()).st_size
                digest = hash_of(file)[0] if size == shard.bytes else ""
        except (OSError, ValueError) as error:
            out.problems.append(f"{shard.name}: cannot be read: {error}")
            return out
        if size != shard.bytes:
            out.problems.append(f"{shard.name}: has {size} bytes, not {shard.bytes}")
        elif digest != shard.sha256:
            out.problems.append(f"{shard.name}: its hash is not the manifest's")
        if self.dataset is not None:
            self._records(self.dataset, range(self.first[number], self.first[number + 1]), out)
        return out

    def _records(self, dataset: Dataset, items: range, out: CheckedShard) -> None:
        graphs, _ = _graphs(self.manifest)
        for item, crystal, tensors in dataset.read_records(items):
            where = dataset.where(item)
            if isinstance(crystal, BadCrystal):
                out.problems.append(str(crystal))
                continue
            out.ids.append((crystal.id, where))
            for stored in graphs:
                try:
                    if stored.find(tensors, len(crystal)) is None:
                        out.problems.append(f"{where}, {crystal.id}: has no graph {stored.key}")
                except BadCrystal as error:
                    out.problems.append(f"{where}, {crystal.id}: {error}")
            out.elements.update(crystal.numbers.tolist())
            labels = [crystal.targets[name] for name in dataset.names]
            told: dict[str, tuple[Any, Any]] = {
                "atoms": (len(crystal), dataset.atoms[item]),
                "volume": (crystal.volume, dataset.volume[item]),
                "targets": (labels, dataset.targets[item]),
            }
            for name, (record, index) in told.items():
                if not np.allclose(record, index, rtol=_SAME, atol=0, equal_nan=True):
                    out.problems.append(
                        f"{where}, {crystal.id}: {name} {record}, the index says {index}"
                    )


def _statistics(dataset: Dataset) -> Iterator[str]:
    """Whether the manifest's statistics of labels are those of the index."""
    for name, target in dataset.manifest.targets.items():
        labels = dataset.targets_of(name)
        known = {s: labels[dataset.stored_items(s)] for s in SPLITS}
        known = {s: values[~np.isnan(values)] for s, values in known.items()}
        counts = {s: len(values) for s, values in known.items()}
        train = known["train"]
        facts = {
            "labelled": (counts, target.labelled),
            "mean": (float(train.mean()) if len(train) else None, target.mean),
            "std": (float(train.std()) if len(train) else None, target.std),
        }
        for fact, (right, told) in facts.items():
            same = right == told
            if isinstance(right, float) and isinstance(told, float):
                same = bool(np.isclose(right, told, rtol=_SAME, atol=_SAME * (1 + abs(right))))
            if not same:
                yield f"{MANIFEST}: {fact} of target {name} is {right}, not {told}"
