"""The loader: a plan's crystals, read, built into graphs and packed into batches, for one rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from crysforge.datapipe.common.processes import Parent
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.transforms import Transform
from crysforge.datapipe.loading.config import LoaderConfig, estimate_edges
from crysforge.datapipe.loading.order import OverLimit, Plan
from crysforge.datapipe.loading.worker import (
    Part,
    Quarantined,
    Reader,
    WorkerFailure,
    as_is,
    begin_worker,
    from_wire,
)
from crysforge.datapipe.schema import CrystalBatch, GraphSpec, concat
from crysforge.datapipe.storage.dataset import Dataset

log = logging.getLogger(__name__)


class Stream:
    """One rank's batches, one per step; iterate over it.

    In training it goes through shuffled epochs without a gap and continues where it stopped
    (`state_dict`). Otherwise every iteration is one unshuffled pass from the beginning, in which
    each crystal comes once; a rank without a crystal in a step gets a batch marked `is_dummy`, and
    so does a rank whose crystals of a step are all unusable.

    Args:
        dataset: where the crystals are.
        split: `train`, `val`, `test`, or None for all of them.
        spec: the graph to build.
        config: loader settings.
        batch_size: crystals per step, over all ranks.
        seed: of the order and of all draws.
        transform: what is done to a crystal before its graph is built.
        targets: labels that batches carry; None for all of the data set.
        select: item numbers to keep of the split.
        min_atoms: smaller crystals are left out.
        epochs: length of training; None never ends.
        train: shuffled epochs, or one pass.
        quotient: whether encoders that allow it get quotient graphs: equal output, fewer edges.

    Attributes:
        position: crystals consumed so far, over all ranks; `position / epoch_size` is the epoch.
        quarantined: what this rank could not use.

    Raises:
        ValueError: nothing to train on, a selected item outside the split, more ranks than lanes,
            a crystal over the limits by itself; while iterating, more than `max_bad` unusable
            crystals, or a failure in a worker.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str | None,
        spec: GraphSpec,
        config: LoaderConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        transform: Transform | None = None,
        targets: Sequence[str] | None = None,
        select: np.ndarray | None = None,
        min_atoms: int = 1,
        epochs: float | None = None,
        train: bool = True,
        quotient: bool = True,
    ) -> None:
        dataset = dataset.through(config.access)
        for name in targets or ():
            dataset.targets_of(name)
        items = _selection(dataset, split, select, min_atoms, train)
        self.config, self.train = config, train
        try:
            self.plan = Plan(
                items=items,
                shards=dataset.shard_of(items),
                batch_size=batch_size,
                world_size=world_size,
                seed=seed,
                shuffle=config.shuffle if train else 0,
                lanes=config.lanes,
                epochs=epochs if train else 1,
                straddle=train,
                **_budget(dataset, items, spec, config, getattr(transform, "views", 1)),
                fingerprint=dataset.manifest.fingerprint,
            )
        except OverLimit as error:
            found = next(dataset.read([error.item]))[1]
            id = found.id if isinstance(found, Crystal) else str(found)
            raise ValueError(f"crystal {id!r} ({dataset.where(error.item)}): {error}") from None
        self._reader = Reader(
            dataset,
            self.plan,
            spec,
            rank=rank,
            seed=seed,
            transform=transform,
            targets=dataset.names if targets is None else targets,
            quotient=quotient,
            keep=len(items) <= config.shuffle,
            max_pairs=config.max_pairs,
            cache_bytes=config.cache_mb * 2**20 // max(1, config.workers),
        )
        self._loader: DataLoader | None = None
        self.position = 0
        self.quarantined: list[Quarantined] = []
        self._bad_items: set[int] = set()
        self._steps = 0
        self._total: int | None = None
        self._dummy: CrystalBatch | None = None

    @property
    def epoch_size(self) -> int:
        """Crystals in one pass."""
        return len(self.plan)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run (in training: those taken, and from there to the end) or pass."""
        if self._total is None:
            self._total = self._steps + self.plan.total_steps(self.position)
        return self._total

    def __len__(self) -> int:
        return self.total_steps

    def largest(self) -> CrystalBatch:
        """A batch as large as any that this rank may get: the crystals with most atoms, as many as
        a step takes, within the limits. It belongs to no epoch and consumes nothing."""
        plan = self.plan
        left = dict(plan.limits)
        chosen: list[int] = []
        most = -(-plan.batch_size // plan.world_size)
        for i in np.argsort(-self._reader.dataset.atoms[plan.items], kind="stable")[: 100 * most]:
            costs = {name: int(plan.costs[name][i]) for name in left}
            if len(chosen) < most and all(costs[name] <= left[name] for name in left):
                chosen.append(int(plan.items[i]))
                left = {name: left[name] - costs[name] for name in left}
        return self._reader.batch_of(chosen) or self._make_dummy()

    def state_dict(self) -> dict[str, Any]:
        """What a run must know to go on behind the last batch that was taken, as JSON. It is the
        same on all ranks and knows of no number of ranks or workers."""
        return {"steps": self._steps, **self.plan.state(self.position)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`.

        Raises:
            ValueError: it belongs to other data, another selection, seed, window or lanes.
        """
        self.position = self.plan.position_in(state)
        self._steps, self._total = int(state["steps"]), None

    def __iter__(self) -> Iterator[CrystalBatch]:
        if not self.train:
            self.position = self._steps = 0
        _ = self.total_steps if self.plan.stop is not None else None
        self._reader.start[0] = self.position
        parts = self._parts()
        try:
            while group := list(islice(parts, max(1, self.config.workers))):
                yield self._joined(group)
        except Exception:
            del parts
            self.close()
            raise

    def _parts(self) -> Iterator[Part | WorkerFailure]:
        """What the workers make, their parts of a step one after another."""
        if self.config.workers == 0:
            return iter(self._reader)
        if self._loader is None:
            self._loader = DataLoader(
                self._reader,
                batch_size=None,
                num_workers=self.config.workers,
                prefetch_factor=self.config.prefetch,
                persistent_workers=True,  # they keep graphs for the next pass
                collate_fn=as_is,
                worker_init_fn=partial(begin_worker, Parent.here()),
                generator=torch.Generator(),  # the global one is not the loader's to draw from
            )
        return iter(self._loader)

    def close(self) -> None:
        """Ends the workers at once, as a failure does; left to the garbage collector they may take
        seconds each. Another iteration starts new ones."""
        self._loader = None

    def _joined(self, group: list[Part | WorkerFailure]) -> CrystalBatch:
        """The workers' parts of a step as one batch."""
        batches, ends = [], set()
        for part in group:
            if isinstance(part, WorkerFailure):
                raise part.error()
            self._quarantine(part.bad)
            ends.add(part.end)
            if part.batch is not None:
                batches.append(from_wire(part.batch))
        assert len(ends) == 1, f"the workers are out of step: {ends}"
        batch = concat(batches) if batches else self._make_dummy()
        self.position, self._steps = ends.pop(), self._steps + 1
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def _quarantine(self, bad: list[Quarantined]) -> None:
        for entry in bad:
            if entry.item not in self._bad_items:
                self._bad_items.add(entry.item)
                self.quarantined.append(entry)
                log.warning("skipped a crystal: %s", entry.reason)
        if len(self.quarantined) > self.config.max_bad:
            raise ValueError(
                f"{len(self.quarantined)} crystals could not be used, more than "
                f"loader.max_bad={self.config.max_bad}; the last: {self.quarantined[-1].reason}"
            )

    def _make_dummy(self) -> CrystalBatch:
        if self._dummy is None:
            self._dummy = self._reader.dummy()
        return self._dummy


def _selection(
    dataset: Dataset, split: str | None, select: np.ndarray | None, min_atoms: int, train: bool
) -> np.ndarray:
    items = np.arange(len(dataset)) if split is None else dataset.split_items(split)
    held = len(items)
    if select is not None:
        outside = np.setdiff1d(select, items)
        if len(outside):
            raise ValueError(f"item {outside[0]} is not in the {split!r} split of {dataset.root}")
        items = np.unique(select).astype(np.int64)
    selected = len(items)
    items = items[dataset.atoms[items] >= min_atoms]
    if train and len(items) == 0:
        raise ValueError(
            f"nothing to train on in the {split!r} split of {dataset.root}: it holds {held} "
            f"crystals, {selected} of them are selected, none has {min_atoms} atoms or more"
        )
    return items


def _budget(
    dataset: Dataset, items: np.ndarray, spec: GraphSpec, config: LoaderConfig, views: int
) -> dict[str, Any]:
    costs, limits = {}, {}
    atoms = dataset.atoms[items].astype(np.int64)
    if config.max_atoms is not None:
        costs["atoms"], limits["atoms"] = views * atoms, config.max_atoms
    if config.max_edges is not None:
        costs["edges"] = views * estimate_edges(spec, atoms, dataset.volume[items])
        limits["edges"] = config.max_edges
    return {"costs": costs, "limits": limits}
