"""Trains a stage to its end, from its newest checkpoint if it has one. The stage defines the loss;
the loop owns steps, logging, validation and checkpoints."""

from __future__ import annotations

import os
from contextlib import closing, nullcontext

import torch

from crysforge.trainer.base.agreement import agree, same_weights
from crysforge.trainer.base.distributed import lost_process
from crysforge.trainer.base.tensors import code_version, load_into
from crysforge.trainer.engines.base import Engine
from crysforge.trainer.engines.build import build_engine
from crysforge.trainer.loop.dry_step import try_batch
from crysforge.trainer.loop.optim import param_groups
from crysforge.trainer.loop.saver import newest
from crysforge.trainer.loop.session import FitResult, Session
from crysforge.trainer.loop.training import Training
from crysforge.trainer.runs.facts import stage_facts
from crysforge.trainer.runs.forms import STATE
from crysforge.trainer.runs.logger import Logger


def fit(session: Session) -> tuple[Engine, FitResult]:
    """Trains a stage to its end, continuing from the run's newest checkpoint of it.

    Raises:
        ValueError: too many updates skipped in a row.
        Requeue: a rank was asked to stop; the run is saved.
    """
    stage, config, trainer, world = session.stage, session.config, session.trainer, session.world
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it on GPUs
    torch.use_deterministic_algorithms(trainer.deterministic)
    code_version()  # as it is now, not when it is first saved
    checkpoint = newest(session.run, stage.name, world)
    if checkpoint is not None:
        load_into(stage, checkpoint.model, f"checkpoint {checkpoint.tag}")
        with checkpoint.read_state(STATE) as state:
            session.train.load_state_dict(state["stream"])
    total = session.train.total_steps // trainer.accumulation
    if config.max_steps is not None:
        total = min(total, config.max_steps)
    if total < 1:
        raise ValueError(f"stage {stage.name!r} has nothing to do: 0 optimiser steps")
    step, tag = (0, "") if checkpoint is None else (checkpoint.step, checkpoint.tag)
    agree(world.meeting, stage_facts(stage, tag, total, session.train))
    rounded = same_weights(world.meeting, stage, world.device)
    session.run.check_owner()  # before the logs of a later process are touched
    logger = Logger(session.run.path, stage.name, step, total, world)
    try:
        if rounded:
            logger.print("the hosts draw initial weights with other rounding: rank 0's are taken")
        if trainer.try_largest or (trainer.try_largest is None and world.device.type == "cuda"):
            logger.print(try_batch(stage, session.train.largest(), trainer, world))
        groups = param_groups(stage, config.weight_decay, session.lr_scales)
        engine = build_engine(stage, groups, config.grad_clip, trainer, world)
        training = Training(session, engine, logger, step)
        interrupts = session.stop.interrupts() if session.stop else nullcontext()
        with closing(training.watchdog), interrupts:
            training.begin(checkpoint, total)
            del checkpoint  # as large as the run
            training.train(step, total)
    except Exception as error:
        logger.event("error", message=str(lost_process(error, world.rank) or error))
        raise
    finally:
        logger.close()
    return engine, training.result
