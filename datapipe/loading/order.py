"""Which crystals a step takes and which reader reads them: a pure function that opens no file.

A run goes through positions 0, 1, 2, …; epoch e of n crystals is the positions e·n … (e+1)·n - 1.
Positions go round the L lanes. What stands at a position depends on the selection, the seed, the
shuffle window and L alone, so the state of a run is the number of positions it has consumed.

Eight crystals a … h in L = 2 lanes, steps of 4, 2 ranks, shuffle=0:

    lane 0          a b c d                  each lane has a part of the shuffled crystals;
    lane 1          e f g h                  rank 0 owns lane 0, rank 1 owns lane 1
    position        0 1 2 3   4 5 6 7        the lanes take it by turns
    crystal         a e b f   c g d h
    step            0         1
    rank 0 reads    a   b     c   d
    rank 1 reads      e   f     g   h
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crysforge.datapipe.loading.epoch import Epoch
from crysforge.datapipe.loading.lanes import default_lanes, share

READ_AHEAD = 64
"""Crystals of a lane that are read together where nothing is shuffled."""
_CHUNK = 1 << 18
"""Positions that are looked at together when a budget is checked."""


class OverLimit(ValueError):
    """A crystal (`item`) that no step can take."""

    def __init__(self, item: int, message: str) -> None:
        super().__init__(message)
        self.item = item


@dataclass(kw_only=True, eq=False)
class Plan:
    """The order of a selection of crystals and its division into steps, ranks and readers.

    Raises:
        ValueError: nothing to train on, settings out of range, more ranks than lanes.
        OverLimit: a crystal is over a rank's limit by itself.
    """

    items: np.ndarray
    """[n] selected item numbers, ascending."""
    shards: np.ndarray
    """[n] shard of each."""
    batch_size: int
    """Crystals per step, over all ranks."""
    world_size: int = 1
    seed: int = 0
    shuffle: int = 16384
    """Window in crystals; 0 keeps the order of the data set."""
    lanes: int | None = None
    """None takes `default_lanes(batch_size)`."""
    epochs: float | None = 1
    """Passes; None never ends."""
    straddle: bool = True
    """Whether a step may reach over the end of an epoch, as in training: then all steps are full,
    and the last one takes what it lacks from the epoch after. Otherwise the last is shorter."""
    costs: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[n] integers per budgeted quantity (atoms, edges)."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Largest sum of a cost over the crystals of one rank in one step."""
    fingerprint: str = ""
    """Of the data set."""

    def __post_init__(self) -> None:
        self.items = np.asarray(self.items, dtype=np.int64)
        if len(self.items) == 0 and self.straddle:
            raise ValueError("there is nothing to train on: no crystal is selected")
        if np.any(np.diff(self.items) <= 0):
            raise ValueError("selected item numbers must be ascending, each once")
        if self.batch_size < 1 or self.shuffle < 0 or not (self.epochs is None or self.epochs > 0):
            raise ValueError(
                f"batch_size must be at least 1, shuffle at least 0, epochs more than 0: got "
                f"{self.batch_size}, {self.shuffle}, {self.epochs}"
            )
        lanes = self.lanes
        if lanes is None:
            lanes = default_lanes(self.batch_size)
            if not self.straddle:  # a rank without a crystal idles; in training that is an error
                lanes = max(lanes, self.world_size)
        elif not 1 <= lanes <= self.batch_size and self.straddle:
            raise ValueError(f"lanes must be 1..batch_size={self.batch_size}, got {lanes}")
        if self.world_size > lanes:
            raise ValueError(
                f"{self.world_size} ranks cannot share {lanes} lanes of a batch of "
                f"{self.batch_size}: use a batch_size that is a multiple of the number of ranks, "
                f"or set lanes={self.world_size}"
            )
        self.num_lanes = lanes
        self._lay_lanes()
        self._weigh()
        self.starts = np.flatnonzero(np.diff(self.shards, prepend=-1))
        self._epochs: dict[int, Epoch] = {}

    def _lay_lanes(self) -> None:
        """Neighbouring positions go to lanes that are far apart (bit reversal), so that ranks,
        which own blocks of lanes, fill up evenly whatever their number."""
        width = max(1, (self.num_lanes - 1).bit_length())
        reversed_bits = [int(f"{lane:0{width}b}"[::-1], 2) for lane in range(self.num_lanes)]
        self._lane_at = np.argsort(reversed_bits)
        self.slot_of = np.argsort(self._lane_at)
        ends = [self.lanes_of(rank)[1] for rank in range(self.world_size)]
        self._rank_at = np.searchsorted(ends, self._lane_at, side="right")

    def _weigh(self) -> None:
        """Checks each crystal against the limits and keeps those limits that can bind."""
        most = np.bincount(self._rank_at).max() * -(-self.batch_size // self.num_lanes)
        self._binding = []
        for name, limit in self.limits.items():
            cost = np.asarray(self.costs[name], dtype=np.int64)
            largest = int(cost.max(initial=0))
            if largest > limit:
                raise OverLimit(
                    int(self.items[np.argmax(cost)]),
                    f"it has {largest} {name}, more than a rank may hold: raise max_{name}={limit} "
                    f"to {largest} or more, or leave such crystals out when preparing the data",
                )
            if largest * most > limit:
                self._binding.append((cost, limit))

    def __len__(self) -> int:
        return len(self.items)

    @property
    def stop(self) -> int | None:
        """Position at which the run ends; None for never. Where steps straddle, the first step
        that reaches it is the last."""
        if self.epochs is None:
            return None
        return max(int(self.straddle), round(self.epochs * len(self)))

    def lanes_of(self, rank: int, worker: int = 0, workers: int = 1) -> tuple[int, int]:
        """First lane and last + 1 of a worker of a rank; there may be none."""
        return share(worker, workers, *share(rank, self.world_size, 0, self.num_lanes))

    # The order of crystals

    def taken(self, position: int, lane: int) -> int:
        """How many positions before `position` belong to a lane."""
        return (position - int(self.slot_of[lane]) + self.num_lanes - 1) // self.num_lanes

    def windows(self, position: int, lane: int) -> Iterator[tuple[int, np.ndarray]]:
        """What a lane holds from `position` on, without end.

        Yields:
            epoch, and item numbers in the order of use. Together they are one shuffle window (or
            what is left of it on resuming): to be read together, in ascending order.
        """
        epoch = position // len(self)
        skip = self.taken(position, lane) - self.taken(epoch * len(self), lane)
        while True:
            chosen = self._epoch(epoch).lane(lane)
            while skip < len(chosen):
                end = skip + self.width - (skip - self.first_end(lane)) % self.width
                yield epoch, self.items[chosen[skip:end]]
                skip = end
            epoch, skip = epoch + 1, 0

    @property
    def fits_window(self) -> bool:
        """Whether the selection fits in the shuffle window, so that it is permuted whole."""
        return len(self) <= self.shuffle

    @property
    def width(self) -> int:
        if self.shuffle == 0:
            return READ_AHEAD
        return len(self) if self.fits_window else max(1, self.shuffle // self.num_lanes)

    def first_end(self, lane: int) -> int:
        """Where a lane's first window ends: staggered, so that lanes are not all read at once."""
        return -(-self.width * (lane + 1) // self.num_lanes)

    def _epoch(self, epoch: int) -> Epoch:
        if epoch not in self._epochs:
            self._epochs = {e: x for e, x in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = Epoch(self, epoch)
        return self._epochs[epoch]

    # Steps

    def steps(self, position: int = 0) -> Iterator[int]:
        """The positions at which the steps from `position` on end: `batch_size` on, or fewer
        where a rank would exceed a limit."""
        ahead = 1
        while self._left(position):
            if not self._binding:
                position = self._full(position)
                yield position
                continue
            ends, all_within = self._within_limits(position, ahead)
            yield from ends
            position = ends[-1] if ends else position
            if all_within:
                ahead = min(2 * ahead, max(1, _CHUNK // self.batch_size))
            else:
                ahead, position = 1, self._cut(position)
                yield position

    def total_steps(self, position: int = 0) -> int:
        """Number of steps from `position` to the end of the run."""
        if self.stop is None:
            raise ValueError("a run without an end (epochs=None) has no number of steps")
        return sum(1 for _ in self.steps(position)) if self._binding else self._left(position)

    def _left(self, position: int) -> int:
        """Number of steps from `position` on, were all full; one if there is no end."""
        return 1 if self.stop is None else max(0, -(-(self.stop - position) // self.batch_size))

    def _full(self, position: int, steps: int = 1) -> int:
        """Where so many full steps from `position` end."""
        end = position + steps * self.batch_size
        return end if self.straddle or self.stop is None else min(end, self.stop)

    def _at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Index into the selection, and rank, of positions start … stop - 1."""
        n = len(self)
        parts = [
            self._epoch(e).order[max(start - e * n, 0) : stop - e * n]
            for e in range(start // n, -(-stop // n))
        ]
        return np.concatenate(parts), self._rank_at[np.arange(start, stop) % self.num_lanes]

    def _within_limits(self, position: int, ahead: int) -> tuple[list[int], bool]:
        """Ends of the next `ahead` full steps as far as they are within the limits, and whether
        all are."""
        ahead = ahead if self.stop is None else min(ahead, self._left(position))
        ends = [self._full(position, i + 1) for i in range(ahead)]
        chosen, ranks = self._at(position, ends[-1])
        part = np.arange(len(chosen)) // self.batch_size * self.world_size + ranks
        good = np.ones(ahead, dtype=bool)
        for cost, limit in self._binding:
            total = np.bincount(part, cost[chosen], minlength=ahead * self.world_size)
            good &= total.reshape(ahead, -1).max(axis=1) <= limit
        count = ahead if good.all() else int(np.argmin(good))
        return ends[:count], count == ahead

    def _cut(self, position: int) -> int:
        """End of the longest step from `position` on that is within all limits."""
        chosen, ranks = self._at(position, self._full(position))
        by_rank = np.argsort(ranks, kind="stable")
        new = np.diff(ranks[by_rank], prepend=-1) != 0
        group = np.cumsum(new) - 1
        length = len(chosen)
        for cost, limit in self._binding:
            total = np.cumsum(cost[chosen[by_rank]])
            before = np.concatenate([[0], total])[np.flatnonzero(new)]
            over = by_rank[total - before[group] > limit]
            length = min(length, over.min(initial=length))
        return position + int(length)

    # State

    def state(self, position: int) -> dict[str, Any]:
        """What a run must know to go on from `position`, as JSON."""
        return {"position": position, **self._identity()}

    def position_in(self, state: Mapping[str, Any]) -> int:
        """The position in a state.

        Raises:
            ValueError: it belongs to another order: other data, selection, seed, window or lanes.
        """
        remedy = {
            "data": "the data set has changed since the run was started",
            "selection": "other crystals are selected than when the run was started",
        }
        for key, value in self._identity().items():
            if state.get(key) != value:
                changed = f"the run was started with {key}={state.get(key)}, now it is {value}"
                raise ValueError(
                    f"cannot continue the order of crystals: {remedy.get(key, changed)}; "
                    f"restore it or start a new run"
                )
        return int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self.fingerprint,
            "selection": hashlib.sha256(self.items.astype("<i8").tobytes()).hexdigest(),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "lanes": self.num_lanes,
        }
