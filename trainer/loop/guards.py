"""What watches over training: skipped updates, loss spikes, hanging steps, too large batches."""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crysforge.datapipe.common.checked import checked
from crysforge.datapipe.common.files import make_directory
from crysforge.datapipe.common.safe_read import parse_json
from crysforge.datapipe.schema import CrystalBatch
from crysforge.trainer.base.tensors import load_tensors, save_tensors
from crysforge.trainer.engines.base import Engine
from crysforge.trainer.runs.logger import Logger

STDERR = 2
MAX_DUMPS = 20
"""Batches that a rank keeps in one start of a run."""


def dump_batch(path: Path, batch: CrystalBatch) -> None:
    """Writes a batch as safetensors; `load_batch` reads it."""
    tensors = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}
    tensors |= {f"targets/{k}": v for k, v in batch.targets.items()}
    make_directory(path.parent, parents=False)  # the run may have been deleted
    save_tensors(path, tensors, {"ids": json.dumps(batch.ids)})


def load_batch(path: Path) -> CrystalBatch:
    """A batch that `dump_batch` wrote. Raises ValueError for a file that is none."""
    from safetensors import safe_open

    values: dict = {"targets": {}}
    for key, value in load_tensors(path).items():
        if key.startswith("targets/"):
            values["targets"][key.removeprefix("targets/")] = value
        else:
            values[key] = value
    with safe_open(path, "pt") as file:
        ids = parse_json((file.metadata() or {}).get("ids", "[]"), f"{path}: ids")
    values["ids"] = checked(list[str], ids, str(path), "ids")
    try:
        return CrystalBatch(**values)
    except TypeError as error:
        raise ValueError(f"{path} holds no batch: {error}") from None


@dataclass
class _Step:
    """A step whose verdict is not read yet."""

    number: int
    batches: list[CrystalBatch]
    own_losses: list[Tensor]
    losses: list[Tensor]
    buffers: list[Tensor]
    verdict: Tensor
    """[stop, skipped], on the CPU once `arrived`."""
    arrived: torch.cuda.Event | None


class StepGuard:
    """Learns after every step whether its update was left out and whether a rank wants to stop.

    On a GPU it reads a step's verdict when the next one is under way, so that the host never waits
    for the device; on a CPU at once. All ranks read the same numbers at the same step.

    An update that was left out takes the batch statistics of its forward pass with it; its
    crystals are named and their batch is kept.

    Attributes:
        skipped: updates skipped so far.
        in_row: how many of them in a row, up to now.
    """

    def __init__(self, engine: Engine, directory: Path, logger: Logger, max_skipped: int) -> None:
        self.engine, self.directory, self.logger = engine, directory, logger
        self.max_skipped = max_skipped
        self.skipped = self.in_row = 0
        self._lag = 1 if engine.world.device.type == "cuda" else 0
        self._pending: deque[_Step] = deque()
        self._before: list[Tensor] = []
        self._dumps = 0

    def before(self) -> None:
        """To be called before the forward passes of a step."""
        self._before = [b.clone() for b in self.engine.stage.buffers()]

    def after(
        self,
        number: int,
        batches: list[CrystalBatch],
        own_losses: list[Tensor],
        losses: list[Tensor],
        stop: Tensor,
    ) -> None:
        """To be called after the update.

        Args:
            number: of the step, from 1.
            batches: this rank's micro-batches.
            own_losses: this rank's loss of each.
            losses: the global loss of each.
            stop: above zero if a rank wants to stop.
        """
        skipped = torch.as_tensor(self.engine.skipped, dtype=stop.dtype)
        verdict, arrived = torch.stack([stop, skipped.to(stop.device, non_blocking=True)]), None
        if verdict.is_cuda:
            on_host = torch.empty(2, dtype=verdict.dtype, pin_memory=True)
            verdict = on_host.copy_(verdict, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(
            _Step(number, batches, own_losses, losses, self._before, verdict, arrived)
        )

    def resolve(self, wait: bool = False) -> bool:
        """Reads the verdicts that are due, or all with `wait`; whether a rank wants to stop.

        Raises:
            ValueError: too many updates in a row were left out.
        """
        stop = False
        while len(self._pending) > (0 if wait else self._lag):
            step = self._pending.popleft()
            if step.arrived is not None:
                step.arrived.synchronize()
            wanted, skipped = step.verdict.tolist()
            stop = stop or wanted > 0
            self.in_row = self.in_row + 1 if skipped else 0
            if skipped:
                self._undo(step)
        return stop

    @torch.no_grad()
    def _undo(self, step: _Step) -> None:
        self.skipped += 1
        for live, before in zip(self.engine.stage.buffers(), step.buffers, strict=True):
            live.copy_(before)
        for later in self._pending:  # its own copy has what is undone here
            later.buffers = step.buffers
        by_loss = not bool(torch.isfinite(torch.stack(step.losses)).all())
        suspects = [
            batch
            for batch, loss in zip(step.batches, step.own_losses, strict=True)
            if not by_loss or not bool(torch.isfinite(loss))
        ]
        self._report(step.number, "loss" if by_loss else "gradient", suspects)
        if self.in_row >= self.max_skipped:
            raise ValueError(
                f"{self.in_row} updates in a row were left out since loss or gradient were not "
                f"finite: lower {self.engine.stage.name}.lr, or look at the crystals in "
                f"{self.directory}"
            )

    def _report(self, number: int, what: str, suspects: list[CrystalBatch]) -> None:
        rank = self.engine.world.rank
        ids = [id for batch in suspects for id in batch.ids]
        kept = []
        for i, batch in enumerate(suspects):
            if self._dumps < MAX_DUMPS:
                stem = f"{self.engine.stage.name}-{number:08d}-rank-{rank:04d}-{i}"
                self._dumps += 1
                try:
                    dump_batch(self.directory / f"{stem}.safetensors", batch)
                    kept.append(f"{stem}.safetensors")
                except OSError as error:
                    self.logger.print(f"warning: the batch is not kept: {error}", every_rank=True)
        self.logger.event("skip", step=number, cause=what, crystals=ids, batches=kept)
        if ids or rank == 0:
            shown = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
            self.logger.print(
                f"step {number}: the {what} is non-finite, update skipped on all ranks; "
                f"crystals of rank {rank}: {shown or 'none of them'}"
                + (f"; kept in {self.directory / kept[0]}" if kept else ""),
                every_rank=True,
            )


class SpikeMonitor:
    """Notices a loss far above the running median.

    Args:
        factor: how many times the median is a spike; 0 switches the monitor off.
        recent: losses of the last steps, to go on from.
    """

    LEAST = 20
    """Losses that make a median."""

    def __init__(self, factor: float, recent: Iterable[float] = ()) -> None:
        self.factor = factor
        self.recent = deque(recent, maxlen=200)

    def check(self, first: int, losses: Iterable[float]) -> list[str]:
        """A sentence for each spike among the losses of steps `first`, `first` + 1, …"""
        found = []
        for step, loss in enumerate(losses, first):
            if not abs(loss) < float("inf"):
                continue
            if self.factor and len(self.recent) >= self.LEAST:
                median = statistics.median(self.recent)
                if loss > median + (self.factor - 1) * abs(median):
                    found.append(
                        f"loss {loss:.4g} at step {step} is {loss / median:.3g} times "
                        f"the running median {median:.4g}"
                    )
            self.recent.append(loss)
        return found
