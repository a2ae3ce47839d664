"""What runs a stage's forward, backward and update: plain torch on one device, or DeepSpeed.

Both keep fp32 master weights, run matrix products in bf16 or fp16 by autocast, skip an update
whose gradient is not finite, and give and take their whole state as named full tensors. So a
checkpoint written by one engine, ZeRO stage or number of ranks continues on any other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from crysforge.datapipe.schema import CrystalBatch
from crysforge.trainer.base.distributed import World
from crysforge.trainer.base.tensors import copied_state
from crysforge.trainer.engines.adamw import (
    MOMENTS,
    GuardedAdamW,
    adamw,
    host_copy,
    load_state,
    state_of,
    step_count,
)
from crysforge.trainer.engines.base import (
    BUCKET,
    PRECISIONS,
    Engine,
    EngineConfig,
    schedule,
)
from crysforge.trainer.stages.base import Stage, Term

SMALL_PART = 10**6
"""Elements of a rank's part of the optimiser below which the parts of a bucket are not reduced one
by one: 4 MB take as long (0.1 ms at 40 GB/s) as the latency of a collective among many nodes."""


def communication(parameters: int, ranks: int) -> dict[str, int | bool]:
    """How DeepSpeed sums the gradients of so many parameters in ZeRO 1 to 3.

    A bucket is reduced beside the backward pass as soon as it is full. In ZeRO 1 and 2 either every
    rank gets all sums of a bucket, in one collective, or each rank those of its own part: half the
    bytes, but a collective for each part.
    """
    bucket = min(BUCKET, -(-parameters // 512) * 512)
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "use_multi_rank_bucket_allreduce": parameters < SMALL_PART * ranks,
    }


class DeepSpeedEngine(Engine):
    """Any number of ranks, ZeRO 0 to 3."""

    def __init__(
        self, stage: Stage, groups: list[dict], grad_clip: float, config: EngineConfig, world: World
    ) -> None:
        import deepspeed

        # On CPUs DeepSpeed compiles shared-memory collectives at the first start, for a minute and
        # again in every other environment of the same user; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():  # alone, without a launcher
            backend = "nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        dtype = PRECISIONS[config.precision]
        if dtype == torch.float16 and world.device.type == "cpu":
            raise ValueError("precision=fp16 needs a GPU: use bf16 or fp32 on CPUs")
        self.world, self.zero_stage = world, config.zero_stage
        self._names = [n for n, _ in stage.named_parameters()]
        size = sum(p.numel() for p in stage.parameters())
        settings = {
            # the loop forms batches itself; DeepSpeed only has to agree on the accumulation
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": grad_clip if config.zero_stage else 0.0,  # else by GuardedAdamW
            "zero_optimization": {
                "stage": config.zero_stage,
                "overlap_comm": world.device.type == "cuda",
                "contiguous_gradients": True,
                **communication(size, world.size),
            },
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {
                "enabled": dtype is not None,
                "dtype": str(dtype or torch.bfloat16).removeprefix("torch."),
            },
            "steps_per_print": 2**62,
        }
        stage = stage.to(world.device)
        guarded = GuardedAdamW(groups, grad_clip, world.device)  # ZeRO has guards of its own
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=stage,
            optimizer=adamw(groups, world.device) if config.zero_stage else guarded,
            config=settings,
            dist_init_required=True,
        )
        self.stage = self.engine.module

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        return self.engine(batch)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float, beta1: float) -> None:
        boundary = self.engine.is_gradient_accumulation_boundary()
        if boundary:
            schedule(self.optimizer.param_groups, lr, beta1)
        self.engine.step()
        if boundary and isinstance(self.optimizer, GuardedAdamW):
            self.grad_norm, self.skipped = self.optimizer.grad_norm, self.optimizer.skipped
        elif boundary:
            self.grad_norm = self.engine.get_global_grad_norm() or 0.0
            self.skipped = self.optimizer.overflow

    def _gathered(self):
        import deepspeed

        return deepspeed.zero.GatheredParameters(
            list(self.stage.parameters()), enabled=self.zero_stage == 3
        )

    def weights(self) -> dict[str, Tensor]:
        with self._gathered():
            if not self.world.main:
                return {}
            return copied_state(self.stage)

    def _link(self) -> None:
        """Points every parameter at its shard of the moments (ZeRO 1 and 2).

        DeepSpeed links once, after the first of several parameter groups has stepped, and so
        leaves the later groups without.
        """
        if self.zero_stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def optimizer_state(self) -> dict[str, Tensor]:
        if self.zero_stage == 0:
            return state_of(self.stage, self.optimizer) if self.world.main else {}
        if not any(self.optimizer.optimizer.state.values()):  # no update yet
            return {}
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        out: dict[str, Tensor] = {}
        for name, parameter in zip(self._names, self.stage.parameters(), strict=True):
            for key in MOMENTS:
                full = safe_get_full_optimizer_state(parameter, key)
                if self.world.main and full is not None:
                    out[f"{key}/{name}"] = host_copy(full)
        for moments in self.optimizer.optimizer.state.values():
            if self.world.main and "step" in moments:
                out["step"] = host_copy(torch.as_tensor(moments["step"])).reshape(())
        return out

    def load_optimizer(self, state: Mapping[str, Tensor]) -> None:
        if self.zero_stage == 0 or not state:  # nothing yet: every update was left out
            load_state(self.stage, self.optimizer, state)
            return
        from deepspeed.utils import safe_get_local_optimizer_state as local_state
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self.optimizer
        sharded = (
            zero.single_partition_of_fp32_groups
            if self.zero_stage < 3
            else (zero.fp32_partitioned_groups_flat)
        )
        for flat in sharded:
            moments = {k: torch.zeros_like(flat) for k in MOMENTS}
            step = step_count(zero.optimizer, flat, state)
            zero.optimizer.state[flat] = {"step": step, **moments}
        self._link()
        for name, parameter in zip(self._names, self.stage.parameters(), strict=True):
            for key in MOMENTS:
                if f"{key}/{name}" not in state:  # it never had a gradient
                    continue
                full = state[f"{key}/{name}"].to(self.world.device)
                if self.zero_stage < 3:
                    safe_set_full_optimizer_state(parameter, full, key)
                    continue
                # ZeRO-3 pads each parameter to equal parts; its own setter assumes no padding
                part = local_state(parameter, key)
                padded = full.new_zeros(part.numel() * self.world.size)
                padded[: full.numel()] = full.flatten()
                part.copy_(padded.view(self.world.size, -1)[self.world.rank])
