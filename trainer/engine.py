"""What runs a stage's forward, backward and update: plain torch on one device, or DeepSpeed.

Both keep fp32 master weights, run matrix products in bf16 or fp16 by autocast, skip an update
whose gradient is not finite, and give and take their whole state as named full tensors. So a
checkpoint written by one engine, ZeRO stage or number of ranks continues on any other.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datapipe.schema import CrystalBatch
from models.recompute import RECOMPUTE
from trainer.distributed import World
from trainer.files import copied_state
from trainer.stage import Stage, Term

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(kw_only=True)
class EngineConfig:
    """How a stage is run on the hardware; changes nothing about what is learned."""

    engine: str = "auto"
    """`torch` (one device), `deepspeed`, or `auto`: DeepSpeed when a launcher started the job."""
    precision: str = "fp32"
    """Matrix products in fp32, bf16 or fp16 (fp16 with loss scaling, on GPUs)."""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 0 nothing, 1 optimiser state, 2 also gradients, 3 also weights sharded."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    recompute: str = "auto"
    """What the denoiser makes again in the backward pass instead of keeping it: `none`; `cheap`,
    what no matrix product made, and attention; `blocks`, all but each block's input, for a third
    more arithmetic; `auto`: cheap on GPUs, none on CPUs. Equal results."""
    timeout_s: float = 1800
    """Longest wait for another rank, in seconds."""
    deterministic: bool = False
    """Only deterministic kernels; slower on GPUs."""

    def __post_init__(self) -> None:
        if self.engine not in ("auto", "torch", "deepspeed"):
            raise ValueError(f"engine must be auto, torch or deepspeed, got {self.engine!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be fp32, bf16 or fp16, got {self.precision!r}")
        if self.recompute not in ("auto", *RECOMPUTE):
            kinds = ", ".join(RECOMPUTE)
            raise ValueError(f"recompute must be auto, {kinds}, got {self.recompute!r}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {self.timeout_s}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, got {self.accumulation}")


class Engine(ABC):
    """One stage on this rank's device."""

    stage: Stage
    world: World
    grad_norm: Tensor | float = 0.0
    """Gradient norm of the last step, before clipping."""
    skipped: Tensor | bool = False
    """Whether the last step left out its update because the gradient was not finite, the same on
    all ranks. A tensor may still be on its way: reading it waits for the device."""

    @abstractmethod
    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        """The stage's terms under the engine's precision."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's loss (a mean over micro-batches is formed)."""

    @abstractmethod
    def step(self, lr: float, beta1: float) -> None:
        """Clips and updates once `accumulation` micro-batches are in; leaves weights and moments
        as they are if the gradient is not finite."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Full fp32 state of the module on the CPU. Collective; empty on ranks other than 0."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Full Adam state, `exp_avg/<name>`, `exp_avg_sq/<name>` and `step`. Collective; empty on
        ranks other than 0."""

    @abstractmethod
    def load_optimizer(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `optimizer_state` gave. Every rank passes the same full state."""


def _schedule(groups: Iterable[dict], lr: float, beta1: float) -> None:
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        group["betas"] = (beta1, group["betas"][1])


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips, and leaves out an update whose gradient is not finite.

    The fused kernels take the verdict from the device, so that nobody waits for it.

    Args:
        grad_clip: largest gradient norm over all groups; 0 switches clipping off.
    """

    def __init__(self, groups: list[dict], grad_clip: float, device: torch.device) -> None:
        super().__init__(groups, lr=1e-3, betas=(0.95, 0.999), fused=device.type == "cuda")
        self._step_supports_amp_scaling = False  # a gradient scaler unscales before `step`
        self.grad_clip = grad_clip
        self.grad_norm: Tensor | float = 0.0
        self.skipped: Tensor | bool = False

    def step(self, closure: Any = None) -> Any:
        parameters = [p for g in self.param_groups for p in g["params"]]
        limit = self.grad_clip or float("inf")
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        self.skipped = ~torch.isfinite(self.grad_norm)
        if self.defaults["fused"]:
            self.found_inf = self.skipped.float()
            super().step(closure)
        elif not self.skipped:
            super().step(closure)


def _adamw(groups: list[dict], device: torch.device) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.95, 0.999), fused=device.type == "cuda")


def _host(tensor: Tensor) -> Tensor:
    """An fp32 copy on the CPU that no later step changes."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _plain_state(stage: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, parameter in stage.named_parameters():
        moments = optimizer.state.get(parameter)
        if moments:
            for key in _MOMENTS:
                out[f"{key}/{name}"] = _host(moments[key])
            out["step"] = _host(torch.as_tensor(moments["step"])).reshape(())
    return out


def _load_plain(
    stage: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    for name, parameter in stage.named_parameters():
        if f"exp_avg/{name}" in state:
            moments = {k: state[f"{k}/{name}"].to(parameter, copy=True) for k in _MOMENTS}
            fused = bool(optimizer.defaults.get("fused"))
            step = state["step"].clone().to(parameter.device if fused else "cpu")
            optimizer.state[parameter] = {"step": step, **moments}


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
        _schedule(self.optimizer.param_groups, lr, beta1)
        self.scaler.unscale_(self.optimizer)
        self.optimizer.step()
        self.scaler.update()
        self.grad_norm, self.skipped = self.optimizer.grad_norm, self.optimizer.skipped
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        return copied_state(self.stage)

    def optimizer_state(self) -> dict[str, Tensor]:
        return _plain_state(self.stage, self.optimizer)

    def load_optimizer(self, state: Mapping[str, Tensor]) -> None:
        _load_plain(self.stage, self.optimizer, state)


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
        bucket = min(5 * 10**8, -(-size // 512) * 512)  # the default buffer alone takes 2 GB
        settings = {
            # the loop forms batches itself; DeepSpeed only has to agree on the accumulation
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": grad_clip if config.zero_stage else 0.0,  # else by GuardedAdamW
            "zero_optimization": {
                "stage": config.zero_stage,
                "overlap_comm": world.device.type == "cuda",
                "contiguous_gradients": True,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
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
            optimizer=_adamw(groups, world.device) if config.zero_stage else guarded,
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
            _schedule(self.optimizer.param_groups, lr, beta1)
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
            return _plain_state(self.stage, self.optimizer) if self.world.main else {}
        if not any(self.optimizer.optimizer.state.values()):  # no update yet
            return {}
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        out: dict[str, Tensor] = {}
        for name, parameter in zip(self._names, self.stage.parameters(), strict=True):
            for key in _MOMENTS:
                full = safe_get_full_optimizer_state(parameter, key)
                if self.world.main and full is not None:
                    out[f"{key}/{name}"] = _host(full)
        for moments in self.optimizer.optimizer.state.values():
            if self.world.main and "step" in moments:
                out["step"] = _host(torch.as_tensor(moments["step"])).reshape(())
        return out

    def load_optimizer(self, state: Mapping[str, Tensor]) -> None:
        if self.zero_stage == 0 or not state:  # nothing yet: every update was left out
            _load_plain(self.stage, self.optimizer, state)
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
            moments = {k: torch.zeros_like(flat) for k in _MOMENTS}
            zero.optimizer.state[flat] = {"step": state["step"].clone(), **moments}
        self._link()
        for name, parameter in zip(self._names, self.stage.parameters(), strict=True):
            for key in _MOMENTS:
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


def set_recompute(stage: nn.Module, recompute: str, device: torch.device) -> None:
    """Tells the stage's modules that can recompute what to, `auto` by the device."""
    if recompute == "auto":
        recompute = "none" if device.type == "cpu" else "cheap"
    for module in stage.modules():
        if hasattr(module, "recompute"):
            module.recompute = recompute  # type: ignore[assignment]


def uses_deepspeed(config: EngineConfig, world: World) -> bool:
    """Whether DeepSpeed runs the steps."""
    launched = world.size > 1 or "LOCAL_RANK" in os.environ
    return config.engine == "deepspeed" or (config.engine == "auto" and launched)


def build_engine(
    stage: Stage, groups: list[dict], grad_clip: float, config: EngineConfig, world: World
) -> Engine:
    """The engine the config asks for, with `stage` on this rank's device."""
    set_recompute(stage, config.recompute, world.device)
    if uses_deepspeed(config, world):
        return DeepSpeedEngine(stage, groups, grad_clip, config, world)
    return TorchEngine(stage, groups, grad_clip, config, world)
