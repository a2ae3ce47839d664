"""What a loader worker does: reads its lanes, builds graphs, packs its part of every step."""

from __future__ import annotations

import logging
import os
import signal
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from crysforge.datapipe.common.processes import Parent
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal, crystal_key
from crysforge.datapipe.graphs.packing import Neighbours, neighbours, pack
from crysforge.datapipe.graphs.stored import StoredGraphs
from crysforge.datapipe.graphs.transforms import Sample, Transform
from crysforge.datapipe.loading.order import Plan
from crysforge.datapipe.schema import CrystalBatch, GraphSpec
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.record import Tensors

log = logging.getLogger(__name__)

LASTING = -1
"""Stands for the epoch in the seed of what is drawn once for all epochs."""

Found = tuple[Crystal | BadCrystal, Neighbours | None]
"""What was read of an item: its crystal, or what is wrong with it, and its graph if that lies in
the shards."""


@dataclass(frozen=True)
class Quarantined:
    """A crystal that could not be used."""

    item: int
    reason: str
    """One line that names shard, entry and, where it could be read, the id."""


@dataclass
class Part:
    """What a worker has made of its lanes' crystals of one step."""

    end: int
    """Position behind the step."""
    batch: CrystalBatch | dict | None
    """None: it had no usable crystal. A dict is a batch on the wire."""
    bad: list[Quarantined]

    def to_wire(self) -> Part:
        """The same with numpy arrays: in one message these travel several times faster between
        processes than torch's one shared-memory file per tensor."""
        if not isinstance(self.batch, CrystalBatch):
            return self
        return replace(self, batch=_convert(vars(self.batch), Tensor, Tensor.numpy))


@dataclass
class WorkerFailure:
    """Why a worker stopped."""

    message: str
    is_bug: bool

    def error(self) -> Exception:
        """What the training process raises."""
        return RuntimeError(self.message) if self.is_bug else ValueError(self.message)


class Reader(IterableDataset):
    """What runs in a worker: reads its lanes and packs its part of every step."""

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        spec: GraphSpec,
        *,
        rank: int,
        seed: int,
        transform: Transform | None,
        targets: Sequence[str],
        quotient: bool,
        keep: bool,
        max_pairs: int,
        cache_bytes: int,
    ) -> None:
        self.dataset, self.plan, self.spec, self.quotient = dataset, plan, spec, quotient
        self.rank, self.seed, self.transform, self.targets = rank, seed, transform, list(targets)
        self.start = torch.zeros(1, dtype=torch.int64).share_memory_()
        """Position where the next iteration starts; living workers see it change."""
        self._stored, self._max_pairs = StoredGraphs(spec, max_pairs), max_pairs
        if dataset.manifest.graphs and self._stored.key not in dataset.manifest.graphs:
            log.warning(
                "%s stores graphs of other encoders; they are built anew: see "
                "launch/prepare.py bake=… encoders=[…]",
                dataset.root,
            )
        self._kept: dict[int, Found] | None = {} if keep else None
        self._graphs = _Cache(cache_bytes)

    def __iter__(self) -> Iterator[Part | WorkerFailure]:
        worker = get_worker_info()
        if worker is None:
            yield from self._parts(0, 1)
            return
        try:
            for part in self._parts(worker.id, worker.num_workers):
                yield part.to_wire()
        except ValueError as error:
            yield WorkerFailure(str(error), is_bug=False)
        except Exception as error:
            text = traceback.format_exc()
            yield WorkerFailure(
                f"the loader failed: {type(error).__name__}: {error}\n{text}", is_bug=True
            )

    def _parts(self, worker: int, workers: int) -> Iterator[Part]:
        position = int(self.start)
        lanes = range(*self.plan.lanes_of(self.rank, worker, workers))
        sources = [self._lane(position, lane) for lane in lanes]
        for end in self.plan.steps(position):
            samples: list[tuple[Sample, Neighbours]] = []
            bad: list[Quarantined] = []
            for lane, source in zip(lanes, sources, strict=True):
                for _ in range(self.plan.taken(end, lane) - self.plan.taken(position, lane)):
                    try:
                        samples += self._prepare(*next(source))
                    except _Unusable as error:
                        bad.append(error.entry)
            yield Part(end, self._pack(samples), bad)
            position = end

    def _lane(self, position: int, lane: int) -> Iterator[tuple[int, int, Found]]:
        """Epoch, item and crystal of a lane from `position` on."""
        for epoch, items in self.plan.windows(position, lane):
            found = self._read(items.tolist())
            for item in items.tolist():
                yield epoch, item, found[item]

    def _load(self, items: Iterable[int]) -> Iterator[tuple[int, Found]]:
        for item, crystal, tensors in self.dataset.read_records(items):
            yield item, self._found(item, crystal, tensors)

    def _found(self, item: int, crystal: Crystal | BadCrystal, tensors: Tensors) -> Found:
        if isinstance(crystal, BadCrystal):
            return crystal, None
        try:
            return crystal, self._stored.find(tensors, len(crystal))
        except BadCrystal as error:
            return BadCrystal(f"{self.dataset.where(item)}, {crystal.id}: {error}"), None

    def _read(self, items: list[int]) -> Mapping[int, Found]:
        if self._kept is None:
            return dict(self._load(sorted(items)))
        if any(item not in self._kept for item in items):
            # A shuffled set is read as a whole: every lane's items lie all over it.
            wanted = self.plan.items.tolist() if self.plan.shuffle else sorted(items)
            self._kept.update(self._load(wanted))
        return self._kept

    def _prepare(self, epoch: int, item: int, found: Found) -> list[tuple[Sample, Neighbours]]:
        """A crystal as its epoch shows it, in one view or several, with its geometry."""
        crystal, graph = found
        if isinstance(crystal, BadCrystal):
            raise _Unusable(item, str(crystal))
        key, lasting = (crystal_key(self.seed, e, crystal.id) for e in (epoch, LASTING))
        sample = Sample.clean(crystal, key, lasting)
        transform = self.transform or Transform()

        def graph_of(seen: Crystal) -> Neighbours:
            if seen is not crystal:
                return neighbours(seen, self.spec, self._max_pairs)
            return graph or self._graph_of(item, crystal)

        try:
            return transform.show(sample, graph_of)
        except ValueError as error:
            raise _Unusable(item, f"{self.dataset.where(item)}, {crystal.id}: {error}") from None

    def _graph_of(self, item: int, crystal: Crystal) -> Neighbours:
        """The graph of a crystal as it is, which is kept."""
        graph = self._graphs.get(item)
        if graph is None:
            graph = neighbours(crystal, self.spec, self._max_pairs)
            self._graphs.put(item, graph, graph.nbytes)
        return graph

    def _pack(self, samples: list[tuple[Sample, Neighbours]]) -> CrystalBatch | None:
        if not samples:
            return None
        shown, graphs = zip(*samples, strict=True)
        return pack(shown, graphs, self.spec, self.targets, self.quotient)

    def batch_of(self, items: Sequence[int]) -> CrystalBatch | None:
        """Certain crystals as they are shown in the first epoch, as far as they are usable."""
        samples: list[tuple[Sample, Neighbours]] = []
        for item, found in self._load(sorted(items)):
            with suppress(_Unusable):
                samples += self._prepare(0, item, found)
        return self._pack(samples)

    def dummy(self) -> CrystalBatch:
        """The first usable crystal of the selection, marked as dummy."""
        for item, found in self._load(self.plan.items[:1000]):
            try:
                batch = self._pack(self._prepare(0, item, found))
            except _Unusable:
                continue
            assert batch is not None
            return replace(batch, is_dummy=True)
        raise ValueError(f"{self.dataset.root}: none of the first 1000 crystals can be used")


class _Unusable(Exception):
    """Carries a crystal into quarantine."""

    def __init__(self, item: int, reason: str) -> None:
        self.entry = Quarantined(item, reason)


class _Cache:
    """Keeps what was used last, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._items: OrderedDict[int, tuple[Any, int]] = OrderedDict()

    def get(self, key: int) -> Any:
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key][0]

    def put(self, key: int, value: Any, size: int) -> None:
        size += 1000  # the objects around the arrays
        self._items[key] = value, size
        self.size += size
        while self.size > self.limit:
            self.size -= self._items.popitem(last=False)[1][1]


def _convert(values: Mapping[str, Any], kind: type, to: Callable) -> dict[str, Any]:
    return {
        k: _convert(v, kind, to) if isinstance(v, dict) else to(v) if isinstance(v, kind) else v
        for k, v in values.items()
    }


def from_wire(batch: CrystalBatch | dict) -> CrystalBatch:
    """A part's batch with tensors."""
    if isinstance(batch, CrystalBatch):
        return batch
    return CrystalBatch(**_convert(batch, np.ndarray, torch.from_numpy))


def as_is(part: Any) -> Any:
    """Keeps the data loader from converting what a worker made."""
    return part


def begin_worker(parent: Parent, worker: int) -> None:
    """A worker ends when the training process tells it to, or ends itself. Ctrl-C and a scheduler's
    signals, which often go to all processes of a job, are for the training process."""
    parent.end_with_me()
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it tells who sent the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
