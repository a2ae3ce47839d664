"""The engine of one device: plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from crysforge.datapipe.schema import CrystalBatch
from crysforge.trainer.base.distributed import World
from crysforge.trainer.base.tensors import copied_state
from crysforge.trainer.engines.adamw import GuardedAdamW, load_state, state_of
from crysforge.trainer.engines.base import (
    PRECISIONS,
    Engine,
    EngineConfig,
    schedule,
)
from crysforge.trainer.stages.base import Stage, Term


class TorchEngine(Engine):
    """One device, no DeepSpeed."""

    def __init__(
        self, stage: Stage, groups: list[dict], grad_clip: float, config: EngineConfig, world: World
    ) -> None:
        if world.size > 1:
            raise ValueError("the torch engine runs on one device; set trainer.engine=deepspeed")
        self.stage, self.world = stage.to(world.device), world
        self.accumulation = config.accumulation
        self.dtype = PRECISIONS[config.precision]
        self.optimizer = GuardedAdamW(groups, grad_clip, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        self._micro = 0

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not None):
            return self.stage(batch)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.accumulation).backward()
        self._micro += 1

    def step(self, lr: float, beta1: float) -> None:
        if self._micro < self.accumulation:
            return
        self._micro = 0
        schedule(self.optimizer.param_groups, lr, beta1)
        self.scaler.unscale_(self.optimizer)
        self.optimizer.step()
        self.scaler.update()
        self.grad_norm, self.skipped = self.optimizer.grad_norm, self.optimizer.skipped
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        return copied_state(self.stage)

    def optimizer_state(self) -> dict[str, Tensor]:
        return state_of(self.stage, self.optimizer)

    def load_optimizer(self, state: Mapping[str, Tensor]) -> None:
        load_state(self.stage, self.optimizer, state)
