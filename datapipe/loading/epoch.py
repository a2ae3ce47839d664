"""The order of one epoch."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np

from crysforge.datapipe.graphs.quotient import mix


class Lanes(Protocol):
    """What the order of an epoch follows from; see `Plan` in order.py."""

    seed: int
    items: np.ndarray
    """[n] items of the selection."""
    shards: np.ndarray
    """[n] shard of each."""
    starts: np.ndarray
    """First index of each run of items of one shard."""
    shuffle: int
    num_lanes: int
    slot_of: np.ndarray
    """[lanes] place of each lane in a round."""

    @property
    def fits_window(self) -> bool: ...

    @property
    def width(self) -> int:
        """Crystals of a lane that are shuffled together."""

    def __len__(self) -> int: ...

    def taken(self, position: int, lane: int) -> int: ...

    def first_end(self, lane: int) -> int: ...


class Epoch:
    """The order of one epoch, worked out as far as it is asked for."""

    def __init__(self, plan: Lanes, epoch: int) -> None:
        self.plan, self.epoch = plan, epoch
        n = len(plan)
        self.start = epoch * n
        lanes = range(plan.num_lanes)
        sizes = [plan.taken(self.start + n, k) - plan.taken(self.start, k) for k in lanes]
        self.cuts = np.cumsum([0, *sizes])
        self._order: np.ndarray | None = None
        self._whole: np.ndarray | None = None
        if plan.shuffle == 0:
            self._whole = np.arange(n)
        elif plan.fits_window:
            self._whole = np.argsort(self._random("items", plan.items), kind="stable")
        else:
            ends = np.append(plan.starts[1:], n)
            shuffled = np.argsort(self._random("shards", plan.shards[plan.starts]), kind="stable")
            self._from, self._to = plan.starts[shuffled], ends[shuffled]
            self._ends = np.cumsum(self._to - self._from)

    def _random(self, purpose: str, values: np.ndarray) -> np.ndarray:
        """[n] uint64, a hash of (seed, epoch, purpose, value). Numpy's generators are not used
        because their streams may change between releases."""
        text = f"{self.plan.seed}/{self.epoch}/{purpose}"
        word = hashlib.blake2b(text.encode(), digest_size=8).digest()
        x = np.frombuffer(word, "<u8") + values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return mix(x)

    def _sequence(self, start: int, stop: int) -> np.ndarray:
        """Part of the epoch's sequence before lanes: indices into the selection."""
        if self._whole is not None:
            return self._whole[start:stop]
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        runs = [np.arange(self._from[i], self._to[i]) for i in range(first, last + 1)]
        skip = start - int(self._ends[first] - len(runs[0]))
        return np.concatenate(runs)[skip : skip + stop - start]

    def lane(self, lane: int) -> np.ndarray:
        """Indices into the selection that a lane holds, in the order of use."""
        start, stop = int(self.cuts[lane]), int(self.cuts[lane + 1])
        if start == stop:
            return np.zeros(0, dtype=np.int64)
        sequence = self._sequence(start, stop)
        if self._whole is not None:
            return sequence
        window = (np.arange(stop - start) - self.plan.first_end(lane)) // self.plan.width
        return sequence[np.lexsort((self._random("window", self.plan.items[sequence]), window))]

    @property
    def order(self) -> np.ndarray:
        """[n] index into the selection that stands at each position of the epoch."""
        if self._order is None:
            self._order = np.empty(len(self.plan), dtype=np.int64)
            for lane in range(self.plan.num_lanes):
                first = (int(self.plan.slot_of[lane]) - self.start) % self.plan.num_lanes
                self._order[first :: self.plan.num_lanes] = self.lane(lane)
        return self._order
