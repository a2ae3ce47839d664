"""Chooses the engine."""

from __future__ import annotations

import os

import torch

from crysforge.models import kernels
from crysforge.trainer.base.distributed import World
from crysforge.trainer.engines.base import PRECISIONS, Engine, EngineConfig, set_recompute
from crysforge.trainer.engines.deepspeed import DeepSpeedEngine
from crysforge.trainer.engines.torch_engine import TorchEngine
from crysforge.trainer.stages.base import Stage


def uses_deepspeed(config: EngineConfig, world: World) -> bool:
    """Whether DeepSpeed runs the steps."""
    launched = world.size > 1 or "LOCAL_RANK" in os.environ
    return config.engine == "deepspeed" or (config.engine == "auto" and launched)


def build_engine(
    stage: Stage, groups: list[dict], grad_clip: float, config: EngineConfig, world: World
) -> Engine:
    """The engine the config asks for, with `stage` on this rank's device."""
    kernels.enable(world.device, {torch.float32, PRECISIONS[config.precision] or torch.float32})
    set_recompute(stage, config.recompute, world.device)
    if uses_deepspeed(config, world):
        return DeepSpeedEngine(stage, groups, grad_clip, config, world)
    return TorchEngine(stage, groups, grad_clip, config, world)
