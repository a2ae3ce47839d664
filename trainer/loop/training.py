"""The training loop: the stage defines the loss; the loop owns steps, logging, validation and
checkpoints."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from crysforge.datapipe.schema import CrystalBatch
from crysforge.trainer.base.signals import Requeue
from crysforge.trainer.base.tensors import code_version, load_into
from crysforge.trainer.engines.base import Engine
from crysforge.trainer.loop.averages import (
    Meter,
    Window,
    evaluate,
    nan_unless_finite,
    terms_of,
    total_over_ranks,
    weighted_loss,
)
from crysforge.trainer.loop.ema import WeightAverage
from crysforge.trainer.loop.guards import SpikeMonitor, StepGuard
from crysforge.trainer.loop.optim import one_cycle
from crysforge.trainer.loop.profiler import ProfileWindow
from crysforge.trainer.loop.saver import Saver
from crysforge.trainer.loop.session import FitResult, Session
from crysforge.trainer.loop.watchdog import Watchdog
from crysforge.trainer.runs.forms import STATE
from crysforge.trainer.runs.logger import Logger
from crysforge.trainer.runs.saved import Checkpoint


@dataclass
class _Best:
    """The best validation so far."""

    value: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)


class Training:
    """One process's pass through a stage, from where it starts to where it ends."""

    def __init__(self, session: Session, engine: Engine, logger: Logger, step: int) -> None:
        self.engine, self.config, self.trainer = engine, session.config, session.trainer
        self.stream, self.validation = session.train, session.validation
        self.run, self.logger, self.stop = session.run, logger, session.stop
        self.monitor, self.patience = session.monitor, session.patience
        run, trainer = session.run, session.trainer
        self.best, self.result = _Best(), FitResult()
        self.meter, self.window = Meter(), Window(first=True)
        self.losses: list[Tensor] = []
        self.average: WeightAverage | None = None
        self.guard = StepGuard(engine, run.path / "skipped", logger, trainer.max_skipped)
        self.spikes = SpikeMonitor(trainer.spike_factor)
        stacks = f"{engine.stage.name}-rank-{engine.world.rank:04d}.txt"
        self.watchdog = Watchdog(trainer.step_timeout_s, run.path / "stacks" / stacks)
        steps = trainer.profile_steps if engine.world.main else None
        self.profile = ProfileWindow(steps, logger.board_path)
        self.quarantined = 0
        self.saver = Saver(
            run,
            engine,
            logger,
            every=trainer.checkpoint_every,
            minutes=trainer.checkpoint_minutes,
            look_every=trainer.log_every,
            milestone_every=trainer.milestone_every,
            keep=trainer.keep,
            step=step,
        )

    def begin(self, checkpoint: Checkpoint | None, total: int) -> None:
        """Restores optimizer, average, best metric and guard state."""
        if self.trainer.ema_decay:
            values = None if checkpoint is None else checkpoint.average
            self.average = WeightAverage(self.engine.stage, self.trainer.ema_decay, values)
        world = self.engine.world
        about = {"host": socket.gethostname(), "pid": os.getpid(), "ranks": world.size}
        about |= {"device": str(world.device), "gpu": world.device_name}
        about |= {"total": total, **code_version()}
        if checkpoint is None:
            self.logger.event("start", step=0, **about)
            return
        self.engine.load_optimizer(checkpoint.optimizer)
        with checkpoint.read_state(STATE) as state:
            self.best = _Best(float(state["best"]), checkpoint.best)
            self.result = FitResult(**state["result"])
            self.meter.load_state_dict(state["meter"], world.device)
            self.guard.skipped = int(state["skipped"])
            self.guard.in_row = int(state["skipped_in_row"])
            self.spikes.recent.extend(map(float, state["losses"]))
        self.logger.event("resume", step=checkpoint.step, **about)
        self.logger.print(f"{checkpoint.stage}: continuing after step {checkpoint.step} of {total}")

    def train(self, step: int, total: int) -> None:
        """Steps `step` + 1 … `total`, and what is due between them."""
        batches, world = iter(self.stream), self.engine.world
        self.engine.stage.train()
        if world.any(self.stop is not None and bool(self.stop.reason)):
            self.leave(step, total)
        while step < total and not self.exhausted:
            before, step = self.epochs, step + 1
            lr = self.train_step(batches, step, total)
            last = step == total
            log_due = last or step % self.trainer.log_every == 0
            validate_due = self.validation is not None and (last or self.crossed(before))
            save_due = last or self.saver.due(step)
            stop = self.guard.resolve(wait=log_due or validate_due or save_due)
            if log_due:
                self.log(step, lr)
            if validate_due:
                self.validate(step)
            if self.exhausted and not last:
                self.logger.print(
                    f"{self.engine.stage.name}: ends after step {step} of {total}, nothing better "
                    f"since step {self.result.best_step}"
                )
                last = save_due = True
            if last:
                self.result.steps = step
            if save_due or stop:
                self.save(step)
            if stop and not last:
                self.leave(step, total)
        self.end(step)

    def train_step(self, batches: Iterator[CrystalBatch], step: int, total: int) -> float:
        """One optimiser step: wait for data, forward, backward, update; the rate used."""
        engine, world = self.engine, self.engine.world
        self.watchdog.reset(10 if self.window.first else 1)
        self.profile.before(step)
        self.guard.before()
        stop = self.stop is not None and self.stop.wanted()
        used: list[CrystalBatch] = []
        shares: list[Tensor] = []
        losses: list[Tensor] = []
        for _ in range(self.trainer.accumulation):
            began = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - began
            terms = terms_of(engine, batch)
            crystals, atoms = (0, 0) if batch.is_dummy else (batch.num_crystals, batch.num_atoms)
            extra = (stop, len(self.stream.quarantined), crystals, atoms, waited)
            sums = total_over_ranks(terms, extra, world)
            share, loss = weighted_loss(terms, sums, engine.stage.weights, world)
            engine.backward(nan_unless_finite(share, loss))
            self.meter.add(list(terms), sums, unless=~torch.isfinite(loss))
            self.window.add(sums[2 * len(terms) :])
            used.append(batch)
            shares.append(share.detach())
            losses.append(loss)
        lr, beta1 = one_cycle(step - 1, total, self.config.lr, self.config.pct_start)
        engine.step(lr, beta1)
        if self.average is not None:
            self.average.update(step)
        self.guard.after(step, used, shares, losses, self.window.stop)
        self.losses.append(torch.stack(losses).mean())
        self.window.steps += 1
        self.profile.after(step)
        self.logger.advance()
        self.logger.heartbeat(step)
        for entry in self.stream.quarantined[self.quarantined :]:
            self.logger.event("quarantine", step=step, item=entry.item, reason=entry.reason)
        self.quarantined = len(self.stream.quarantined)
        return lr

    @property
    def exhausted(self) -> bool:
        """Whether so many validations brought nothing better that the training ends."""
        return 0 < self.patience <= self.result.stale

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.stream.position / self.stream.epoch_size

    def crossed(self, before: float) -> bool:
        """Whether a multiple of `validate_every` epochs was reached since `before`."""
        every = self.trainer.validate_every
        return every > 0 and int(self.epochs / every) > int(before / every)

    def log(self, step: int, lr: float) -> None:
        """Averages since the last call, to the logger."""
        self.run.check_owner()
        means = self.meter.means()
        self.meter = Meter()
        weights = self.engine.stage.weights
        means["loss"] = sum(w * means.get(k, 0.0) for k, w in weights.items())
        scalars = {f"train/{k}": v for k, v in means.items()}
        scalars["optim/lr"] = lr
        scalars["optim/grad_norm"] = float(self.engine.grad_norm)
        scalars["optim/skipped"] = float(self.guard.skipped)
        scalars["data/epoch"] = self.epochs
        scalars |= self.window.scalars(self.engine.world)
        self.window = Window()
        self.logger.scalars(step, scalars)
        self.logger.bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
        self.result.train = means
        self.check_losses(step)
        for sentence in self.engine.stage.warnings(means):
            self.logger.warning(f"step {step}: {sentence}", step=step)

    def check_losses(self, step: int) -> None:
        """Shows the losses up to `step` to the spike monitor."""
        if self.losses:
            losses = torch.stack(self.losses).tolist()
            for sentence in self.spikes.check(step + 1 - len(losses), losses):
                self.logger.warning(sentence, step=step)
            self.losses = []

    def validate(self, step: int) -> None:
        """Averages on the validation split; keeps the weights if they are the best."""
        assert self.validation is not None
        averaged = nullcontext() if self.average is None else self.average.applied()
        with self.window.paused(), averaged:
            means = evaluate(self.engine, self.validation, lambda: self.watchdog.reset(10))
            if self.monitor is not None and self.monitor not in means:
                lacks = f"label for {self.monitor!r}" if means else "crystal"
                raise ValueError(
                    f"the validation split has no {lacks}, and the best weights are to be kept: "
                    "prepare the data with labelled validation crystals"
                )
            better = self.monitor is None or means[self.monitor] < self.best.value
            self.result.stale = 0 if better else self.result.stale + 1
            if better:
                self.result.validation, self.result.best_step = means, step
            if better and self.monitor is not None:
                self.best = _Best(means[self.monitor], self.engine.weights())
        self.logger.scalars(step, {f"val/{k}": v for k, v in means.items()})

    def save(self, step: int) -> None:
        """Begins to save all that the next process needs. Collective."""
        self.watchdog.reset(10)
        self.run.check_owner()
        self.check_losses(step)
        state = {
            "stream": self.stream.state_dict(),
            "best": self.best.value,
            "result": asdict(self.result),
            "meter": self.meter.state_dict(),
            "skipped": self.guard.skipped,
            "skipped_in_row": self.guard.in_row,
            "losses": list(self.spikes.recent),
        }
        with self.window.paused():
            self.saver.save(step, state, self.best.weights, self.average)

    def leave(self, step: int, total: int) -> None:
        """Ends the process; the run is saved and the same command continues it. Collective."""
        assert self.stop is not None
        self.saver.wait()
        reason = self.stop.reason or "another rank was asked to"
        self.logger.event("stop", step=step, reason=reason)
        self.logger.heartbeat(step, "stopped")
        stage = self.engine.stage.name
        self.logger.print(
            f"{stage}: stopped after step {step} of {total} ({reason}); the same command continues"
        )
        self.engine.world.barrier()
        raise Requeue(reason)

    def end(self, step: int) -> None:
        """The stage gets the weights that are handed on."""
        self.saver.wait()
        if self.monitor is not None and self.best.weights:
            load_into(self.engine.stage, self.best.weights, "best weights")
        elif self.average is not None:
            self.average.swap()
        self.logger.event("finish", step=step)
        self.logger.heartbeat(step, "finished")
