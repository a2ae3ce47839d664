"""The one training loop. It knows steps, ranks and files; what is learned is the stage's affair."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from datapipe.schema import CrystalBatch
from datapipe.stream import Stream
from trainer.checkpoint import Checkpoint, RunDirectory
from trainer.distributed import World
from trainer.engine import Engine, EngineConfig, build_engine
from trainer.files import load_into, save_tensors
from trainer.logger import Logger
from trainer.optim import one_cycle, param_groups
from trainer.signals import Requeue, StopRequest
from trainer.stage import Stage, StageConfig, Term


@dataclass(kw_only=True)
class TrainerConfig(EngineConfig):
    """How a run is run: hardware settings, logging, validation, checkpoints."""

    log_every: int = 20
    """Optimiser steps between logged averages."""
    validate_every: float = 1.0
    """Epochs between validations; one more follows the last step."""
    checkpoint_every: int = 1000
    """Optimiser steps between checkpoints; 0 saves by time only."""
    checkpoint_minutes: float = 15.0
    """Minutes between checkpoints; 0 saves by steps only."""
    keep: int = 2
    """Checkpoints kept per stage."""
    max_skipped: int = 20
    """Updates with a non-finite gradient in a row before the run stops."""
    walltime_minutes: float | None = None
    """Time the job has; it saves and exits with code 75 before. Slurm's own limit is known."""
    walltime_margin_minutes: float = 3.0
    """Time kept for the last save; a fifth of the walltime where that is less."""


class Meter:
    """Averages of terms over steps and ranks; stays on the device until read."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Term], counts: Tensor) -> None:
        """Adds this rank's totals and the counts over all ranks, in the order of `terms`."""
        for (name, term), count in zip(terms.items(), counts, strict=True):
            total = term.total.detach().float()
            self._totals[name] = self._totals.get(name, 0) + total
            self._counts[name] = self._counts.get(name, 0) + count

    def means(self) -> dict[str, float]:
        """The averages; collective. A term that never counted anything is left out."""
        if not self._totals:
            return {}
        totals = torch.stack(list(self._totals.values()))
        if self.world.size > 1:
            dist.all_reduce(totals)
        pairs = zip(
            self._totals,
            totals.tolist(),
            torch.stack(list(self._counts.values())).tolist(),
            strict=True,
        )
        return {name: total / count for name, total, count in pairs if count > 0}


def global_counts(terms: Mapping[str, Term], world: World) -> Tensor:
    """Counts of all terms summed over ranks, [terms] fp32."""
    counts = torch.stack([t.count.detach().float().reshape(()) for t in terms.values()])
    if world.size > 1:
        dist.all_reduce(counts)
    return counts


def weighted_loss(
    terms: Mapping[str, Term], counts: Tensor, weights: Mapping[str, float], world: World
) -> Tensor:
    """This rank's share of the loss, scaled so that the mean over ranks is the global loss."""
    loss = None
    for (name, term), count in zip(terms.items(), counts, strict=True):
        if name in weights:
            part = weights[name] * world.size * term.total / count.clamp(min=1e-9)
            loss = part if loss is None else loss + part
    assert loss is not None, "the stage names no loss term"
    return loss


def nothing(terms: Mapping[str, Term]) -> dict[str, Term]:
    """The terms of a batch whose crystals only keep this rank in step with the others."""
    return {name: Term(term.total * 0, term.count * 0) for name, term in terms.items()}


def evaluate(engine: Engine, stream: Stream) -> dict[str, float]:
    """Averages of all terms over one pass in evaluation mode, plus `loss`. Collective."""
    stage, world = engine.stage, engine.world
    stage.eval()
    meter = Meter(world)
    with torch.no_grad():
        for batch in stream:
            terms = engine.forward(batch.to(world.device, non_blocking=True))
            if batch.filler:
                terms = nothing(terms)
            meter.add(terms, global_counts(terms, world))
    stage.train()
    means = meter.means()
    means["loss"] = sum(w * means.get(k, 0.0) for k, w in stage.weights.items())
    return means


@dataclass
class Result:
    """What a finished stage reports."""

    steps: int
    train: dict[str, float]
    """Averages over the last logging window."""
    validation: dict[str, float]
    """Averages of the kept weights on the validation split."""
    best_step: int


def fit(
    stage: Stage,
    config: StageConfig,
    trainer: TrainerConfig,
    train: Stream,
    validation: Stream | None,
    run: RunDirectory,
    world: World,
    *,
    monitor: str | None = None,
    lr_scales: Mapping[str, float] | None = None,
    stop: StopRequest | None = None,
) -> tuple[Engine, Result]:
    """Trains a stage to its end, continuing from the run's newest checkpoint of it.

    Args:
        monitor: validation average to minimise; the weights of its minimum are kept and are in
            `engine.stage` at the end. Without it the last weights are.
        stop: asked after every step whether to save and leave.

    Raises:
        ValueError: too many non-finite gradients in a row.
        Requeue: a rank was asked to stop; the run is saved.
    """
    torch.use_deterministic_algorithms(trainer.deterministic)
    checkpoint = run.latest(stage.name)
    step, best = 0, _Best()
    if checkpoint is not None:
        load_into(stage, checkpoint.model, f"checkpoint {stage.name}-{checkpoint.step:08d}")
        train.load_state_dict(checkpoint.state["stream"])
        step = checkpoint.step
        best = _Best(**checkpoint.state["best"], weights=checkpoint.best)
    total = train.total_steps // trainer.accumulation
    if config.max_steps is not None:
        total = min(total, config.max_steps)
    if total < 1:
        raise ValueError(f"stage {stage.name!r} has nothing to do: 0 optimiser steps")
    engine = build_engine(
        stage, param_groups(stage, config.weight_decay, lr_scales), config.grad_clip, trainer, world
    )
    if checkpoint is not None:
        engine.load_optimizer(checkpoint.optimizer)
    logger = Logger(run.path, stage.name, step, total, enabled=world.main)
    if step:
        logger.say(f"{stage.name}: continuing after step {step} of {total}")
    session = _Session(engine, config, trainer, train, validation, run, logger, monitor, best)
    session.stop = stop
    try:
        session.train(step, total)
        result = session.result
    finally:
        logger.close()
    if monitor is not None and best.weights:
        with_best = best.weights
        load_into(engine.stage, with_best, "best weights")
    return engine, result


@dataclass
class _Best:
    """The best validation so far."""

    value: float = math.inf
    step: int = 0
    weights: dict[str, Tensor] | None = None


class _Session:
    """One process's pass through `fit`, from where it starts to where it ends."""

    def __init__(
        self,
        engine: Engine,
        config: StageConfig,
        trainer: TrainerConfig,
        train: Stream,
        validation: Stream | None,
        run: RunDirectory,
        logger: Logger,
        monitor: str | None,
        best: _Best,
    ) -> None:
        self.engine, self.config, self.trainer = engine, config, trainer
        self.stream, self.validation = train, validation
        self.run, self.logger, self.monitor, self.best = run, logger, monitor, best
        self.meter = Meter(engine.world)
        self.window = _Window()
        self.skipped_in_row = 0
        self.saved_at = time.monotonic()
        self.result = Result(0, {}, {}, 0)
        self.stop: StopRequest | None = None

    def train(self, step: int, total: int) -> None:
        stage = self.engine.stage.train()
        batches = iter(self.stream)
        epochs = self.stream.position / self.stream.epoch_size
        if self.engine.world.any(self.stop is not None and bool(self.stop.reason)):
            self.leave(step, total)
        while step < total:
            lr = self.train_step(batches, step, total)
            step += 1
            self.logger.advance()
            if step % self.trainer.log_every == 0 or step == total:
                self.log(step, lr)
            before, epochs = epochs, self.stream.position / self.stream.epoch_size
            every = self.trainer.validate_every
            due = every > 0 and int(epochs / every) > int(before / every)
            if self.validation is not None and (due or step == total):
                self.validate(step)
                stage.train()
            if step < total and self.engine.world.any(self.stop is not None and self.stop.wanted()):
                self.save(step)
                self.leave(step, total)
            if step < total and self.checkpoint_due(step):
                self.save(step)
        self.result.steps = step

    def leave(self, step: int, total: int) -> None:
        """Ends the process; the run is saved and the same command continues it."""
        assert self.stop is not None
        self.logger.say(
            f"{self.engine.stage.name}: stopped after step {step} of {total} "
            f"({self.stop.reason or 'another rank was asked to'}); the same command continues"
        )
        raise Requeue

    def train_step(self, batches: Any, step: int, total: int) -> float:
        """One optimiser step: wait for data, forward, backward, update; the rate used."""
        engine, world = self.engine, self.engine.world
        for _ in range(self.trainer.accumulation):
            began = time.monotonic()
            batch: CrystalBatch = next(batches)
            self.window.waited += time.monotonic() - began
            device_batch = batch.to(world.device, non_blocking=True)
            terms = engine.forward(device_batch)
            if batch.filler:
                terms = nothing(terms)
            counts = global_counts(terms, world)
            loss = weighted_loss(terms, counts, engine.stage.weights, world)
            engine.backward(loss)
            self.meter.add(terms, counts)
            self.window.crystals += batch.num_crystals
            self.window.atoms += batch.num_atoms
        lr, beta1 = one_cycle(step, total, self.config.lr, self.config.pct_start)
        skipped = engine.skipped
        engine.step(lr, beta1)
        if engine.skipped > skipped:
            self.report_skip(step, batch)
        else:
            self.skipped_in_row = 0
        self.window.steps += 1
        return lr

    def report_skip(self, step: int, batch: CrystalBatch) -> None:
        """An update was skipped: name the crystals, keep the batch, stop if it goes on."""
        self.skipped_in_row += 1
        path = self.run.path / f"skipped-{self.engine.stage.name}-{step:08d}.safetensors"
        if self.engine.world.main:
            tensors = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}
            save_tensors(path, tensors)
        shown = ", ".join(batch.ids[:8])
        self.logger.say(
            f"step {step}: the gradient is not finite, update skipped; crystals {shown} …, "
            f"batch kept in {path}"
        )
        if self.skipped_in_row >= self.trainer.max_skipped:
            raise ValueError(
                f"{self.skipped_in_row} updates in a row had a non-finite gradient: lower "
                f"{self.engine.stage.name}.lr, or look at the crystals in {path.parent}/skipped-*"
            )

    def log(self, step: int, lr: float) -> None:
        """Averages since the last call, to the logger. Collective."""
        means = self.meter.means()
        self.meter.reset()
        weights = self.engine.stage.weights
        means["loss"] = sum(w * means.get(k, 0.0) for k, w in weights.items())
        scalars = {f"train/{k}": v for k, v in means.items()}
        scalars["optim/lr"] = lr
        scalars["optim/grad_norm"] = float(self.engine.grad_norm)
        scalars["optim/skipped"] = float(self.engine.skipped)
        scalars["data/epoch"] = self.stream.position / self.stream.epoch_size
        scalars["data/quarantined"] = float(len(self.stream.quarantined))
        scalars.update(self.window.speeds(self.engine.world))
        self.window = _Window()
        self.logger.scalars(step, scalars)
        self.logger.bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
        self.result.train = means
        for sentence in self.engine.stage.warnings(means):
            self.logger.say(f"warning at step {step}: {sentence}")

    def validate(self, step: int) -> None:
        """Averages on the validation split; keeps the weights if they are the best."""
        assert self.validation is not None
        means = evaluate(self.engine, self.validation)
        self.logger.scalars(step, {f"val/{k}": v for k, v in means.items()})
        if self.monitor is None:
            self.result.validation, self.result.best_step = means, step
        else:
            if self.monitor not in means:
                raise ValueError(
                    f"the validation split has no label for {self.monitor!r}: "
                    "prepare the data with labelled validation crystals"
                )
            if means[self.monitor] < self.best.value:
                self.best.value, self.best.step = means[self.monitor], step
                self.best.weights = self.engine.weights()
                self.result.validation, self.result.best_step = means, step
        self.window = _Window()  # validation time is not training time

    def checkpoint_due(self, step: int) -> bool:
        """Whether steps or minutes say so; all ranks agree."""
        every, minutes = self.trainer.checkpoint_every, self.trainer.checkpoint_minutes
        if every and step % every == 0:
            return True
        if not minutes or step % self.trainer.log_every:
            return False
        due = time.monotonic() - self.saved_at > 60 * minutes
        return bool(self.engine.world.broadcast(float(due)))

    def save(self, step: int) -> None:
        """Writes a checkpoint. Collective."""
        model, optimizer = self.engine.weights(), self.engine.optimizer_state()
        if self.engine.world.main:
            state = {
                "stream": self.stream.state_dict(),
                "best": {"value": self.best.value, "step": self.best.step},
            }
            checkpoint = Checkpoint(
                self.engine.stage.name, step, state, model, optimizer, self.best.weights or {}
            )
            self.run.save(checkpoint, self.trainer.keep)
        self.engine.world.barrier()
        self.saved_at = time.monotonic()


@dataclass
class _Window:
    """What happened since the last logged step."""

    steps: int = 0
    crystals: int = 0
    atoms: int = 0
    waited: float = 0.0
    began: float = -1.0

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    def speeds(self, world: World) -> dict[str, float]:
        """Throughput over all ranks (assuming equal ranks), data wait, and peak memory in GB."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        if world.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(world.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "speed/crystals_per_s": self.crystals * world.size / seconds,
            "speed/atoms_per_s": self.atoms * world.size / seconds,
            "speed/steps_per_s": self.steps / seconds,
            "speed/data_wait": self.waited / seconds,
            "memory/peak_gb": peak / 1e9,
        }
