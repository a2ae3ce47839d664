"""What watches over training: updates left out, loss spikes, hanging steps, too large batches."""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datapipe.schema import CrystalBatch
from trainer.distributed import World
from trainer.engine import PRECISIONS, Engine, EngineConfig, set_recompute
from trainer.files import load_tensors, save_tensors
from trainer.logger import Logger
from trainer.meter import peak_bytes, total_over_ranks, weighted_loss
from trainer.stage import Stage

STDERR = 2
MAX_DUMPS = 20
"""Batches that a rank keeps in one start of a run."""


def dump_batch(path: Path, batch: CrystalBatch) -> None:
    """Writes a batch as safetensors; `load_batch` reads it."""
    tensors = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}
    tensors |= {f"targets/{k}": v for k, v in batch.targets.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
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
        values["ids"] = json.loads((file.metadata() or {}).get("ids", "[]"))
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
        skipped: updates left out so far.
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

    def judge(self, wait: bool = False) -> bool:
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
                    self.logger.say(f"warning: the batch is not kept: {error}", every_rank=True)
        self.logger.event("skip", step=number, cause=what, crystals=ids, batches=kept)
        if ids or rank == 0:
            shown = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
            self.logger.say(
                f"step {number}: the {what} is not finite, update left out on all ranks; "
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


class Watchdog:
    """Ends a process that hangs, after writing what all its threads were doing.

    A thread watches. Where it cannot run, since the one that hangs holds the interpreter's lock,
    the stacks go to the standard error a little later.

    Args:
        seconds: time between two calls of `feed`; 0 switches it off. The first time is ten times
            as long: kernels are compiled, caches filled.
        path: where the stacks go.
    """

    EXIT = 1
    GRACE_S = 10.0
    """Seconds without the watching thread."""

    def __init__(self, seconds: float, path: Path) -> None:
        self.seconds, self.path = seconds, path
        self._deadline = float("inf")
        self._pause = min(60.0, seconds / 4)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self.feed(10)
            self._arm()
            self._thread.start()

    def feed(self, times: float = 1) -> None:
        """Tells that work goes on; the next call is due within `times` times the seconds."""
        if self.seconds:
            self._deadline = time.monotonic() + times * self.seconds

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._pause):
            self._arm()
            if time.monotonic() > self._deadline:
                self._end()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """Sets the alarm that needs no interpreter."""
        later = self._pause + self.seconds + self.GRACE_S
        faulthandler.dump_traceback_later(later, exit=True, file=STDERR)

    def _end(self) -> None:
        where = f"what all threads were doing is in {self.path}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "w", encoding="utf-8") as file:
                file.write(f"no progress for {self.seconds:g} s or more\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            where = f"what all threads were doing is above ({error})"
            faulthandler.dump_traceback(STDERR, all_threads=True)
        text = f"error: no progress for {self.seconds:g} s (trainer.step_timeout_s); {where}\n"
        os.write(STDERR, text.encode())
        os._exit(self.EXIT)


def try_batch(stage: Stage, batch: CrystalBatch, config: EngineConfig, world: World) -> str:
    """Forward and backward pass of a batch, without an update, before an engine is built; says how
    much memory the training step of such a batch takes. Weights, buffers and all later draws stay
    as they are.

    Raises:
        ValueError: the device's memory does not suffice.
    """
    device, dtype = world.device, PRECISIONS[config.precision]
    stage.to(device).train()
    set_recompute(stage, config.recompute, device)
    before = [b.clone() for b in stage.buffers()]
    size = f"{batch.num_crystals} crystals, {batch.num_atoms} atoms, {batch.num_edges} edges"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            terms = stage(batch.to(device))
        weighted_loss(terms, total_over_ranks(terms, (), world), stage.weights, world)[0].backward()
    except torch.OutOfMemoryError:
        raise ValueError(
            f"a batch of the largest crystals ({size} per rank) does not fit in the memory of "
            f"{device}: set loader.max_atoms below {batch.num_atoms}, or lower the batch size"
        ) from None
    finally:
        stage.zero_grad(set_to_none=True)
        with torch.no_grad():
            for live, kept in zip(stage.buffers(), before, strict=True):
                live.copy_(kept)
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    moments = 8 * trained / (world.size if config.zero_stage else 1)
    peak = (peak_bytes(device) + moments) / 1e9
    text = f"largest batch ({size} per rank): peak memory {peak:.3g} GB"
    if device.type == "cuda":
        text += f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.3g} GB"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return text
