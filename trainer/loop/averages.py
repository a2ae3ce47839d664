"""Sums over batches and ranks, and the averages and the loss that come of them."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.ops.norm import uncounted
from crysforge.trainer.base.distributed import World
from crysforge.trainer.engines.base import Engine
from crysforge.trainer.stages.base import Term


def total_over_ranks(terms: Mapping[str, Term], extra: Sequence[float], world: World) -> Tensor:
    """One vector, fp64 [2 · terms + extra]: totals, counts and further numbers summed over ranks.

    It stays on the device; one collective per micro-batch carries all that ranks must agree on.
    """
    totals = [term.total.detach().reshape(()) for term in terms.values()]
    counts = [term.count.detach().reshape(()) for term in terms.values()]
    own = torch.stack(totals + counts).double()
    if extra:
        host = torch.tensor(extra, dtype=torch.float64)
        if own.is_cuda:
            host = host.pin_memory()
        own = torch.cat([own, host.to(own.device, non_blocking=True)])
    if world.size > 1:
        dist.all_reduce(own)
    return own


def terms_of(engine: Engine, batch: CrystalBatch) -> dict[str, Term]:
    """The stage's terms of a batch. A dummy batch (this rank has no crystals in this step)
    contributes zero to every sum and to batch-norm statistics."""
    on_device = batch.to(engine.world.device, non_blocking=True)
    if not batch.is_dummy:
        return engine.forward(on_device)
    with uncounted(engine.stage):
        terms = engine.forward(on_device)
    return {name: Term(term.total * 0, term.count * 0) for name, term in terms.items()}


def weighted_loss(
    terms: Mapping[str, Term], sums: Tensor, weights: Mapping[str, float], world: World
) -> tuple[Tensor, Tensor]:
    """This rank's share of the loss, scaled so that the mean over ranks is the global loss; and
    the global loss, fp64 without gradient, the same on all ranks.

    Args:
        sums: what `total_over_ranks` gave for these terms.
    """
    n = len(terms)
    share, loss = None, sums.new_zeros(())
    for i, (name, term) in enumerate(terms.items()):
        if name in weights:
            count = sums[n + i].clamp(min=1e-9)
            part = weights[name] * world.size * term.total / count.float()
            share = part if share is None else share + part
            loss = loss + weights[name] * sums[i] / count
    assert share is not None, "the stage names no loss term"
    return share, loss


def nan_unless_finite(share: Tensor, loss: Tensor) -> Tensor:
    """A rank's share of the loss, with NaN for its gradient where the global loss is not finite:
    then all ranks leave the update out together, and no host needs to look."""
    return share * torch.where(torch.isfinite(loss), 1.0, torch.nan).to(share.dtype)


class Meter:
    """Averages of a stage's terms; stays on the device until read."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums: Tensor | None = None

    def add(self, names: Sequence[str], sums: Tensor, unless: Tensor | None = None) -> None:
        """Adds totals and counts, [2 · names and more]; nothing where `unless` is true.

        Raises:
            ValueError: other names than before.
        """
        if self.sums is None:
            self.names = tuple(names)
        elif self.names != tuple(names):
            raise ValueError(
                f"a stage must give the same terms for every batch: {', '.join(self.names)} "
                f"before, {', '.join(names)} now"
            )
        own = sums[: 2 * len(self.names)]
        if unless is not None:
            own = torch.where(unless, 0.0, own)
        self.sums = own.clone() if self.sums is None else self.sums + own

    def means(self) -> dict[str, float]:
        """The averages. A term that never counted anything is left out."""
        if self.sums is None:
            return {}
        values = self.sums.tolist()
        pairs = zip(self.names, values, values[len(self.names) :], strict=False)
        return {name: total / count for name, total, count in pairs if count > 0}

    def state_dict(self) -> dict[str, Any]:
        """The sums as JSON."""
        return {"names": self.names, "sums": [] if self.sums is None else self.sums.tolist()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Takes what `state_dict` gave."""
        self.names = tuple(state["names"])
        if len(state["sums"]) not in (0, 2 * len(self.names)):
            raise ValueError(f"{len(state['sums'])} sums are not those of {len(self.names)} terms")
        self.sums = None
        if state["sums"]:
            self.sums = torch.tensor(state["sums"], dtype=torch.float64, device=device)


def evaluate(
    engine: Engine, stream: Stream, progress: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Averages of all terms over one pass in evaluation mode, plus `loss` and what the stage
    derives; none if there was no crystal. Collective.

    Args:
        progress: called for every batch.
    """
    stage, world = engine.stage, engine.world
    stage.eval()
    meter = Meter()
    with torch.no_grad():
        for batch in stream:
            progress()
            terms = terms_of(engine, batch)
            meter.add(list(terms), total_over_ranks(terms, (), world))
    stage.train()
    means = meter.means()
    if means:
        means["loss"] = sum(w * means.get(k, 0.0) for k, w in stage.weights.items())
        means |= stage.derived(means)
    return means


class Window:
    """Steps since the last logged one: throughput over all ranks, and what else a step reports.

    Args:
        first: whether it is the first of a process.
    """

    REPORTS = 5
    """Numbers that every rank adds to a micro-batch's sums: wish to stop, quarantined crystals,
    crystals, atoms, seconds of waiting for data."""

    def __init__(self, first: bool = False) -> None:
        self.first = first
        self.steps = 0
        self._seconds, self._began = 0.0, time.monotonic()
        self._sums: Tensor | None = None
        self._last: Tensor | None = None

    def add(self, reports: Tensor) -> None:
        """Takes the reports of a micro-batch, summed over ranks."""
        self._sums = reports if self._sums is None else self._sums + reports
        self._last = reports

    @property
    def stop(self) -> Tensor:
        """How many ranks want to stop, as of the last micro-batch."""
        assert self._last is not None
        return self._last[0]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Validation and saving are no training time."""
        self._seconds += time.monotonic() - self._began
        yield
        self._began = time.monotonic()

    def scalars(self, world: World) -> dict[str, float]:
        """Named scalars for the log. Memory is rank 0's."""
        assert self._sums is not None and self._last is not None
        seconds = max(self._seconds + time.monotonic() - self._began, 1e-9)
        _, _, crystals, atoms, waited = self._sums.tolist()
        return {
            "data/quarantined": float(self._last[1]),
            "speed/crystals_per_s": crystals / seconds,
            "speed/atoms_per_s": atoms / seconds,
            "speed/steps_per_s": self.steps / seconds,
            "speed/data_wait": waited / world.size / seconds,
            "memory/peak_gb": peak_bytes(world.device) / 1e9,
        }


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: on the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
