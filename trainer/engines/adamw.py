"""AdamW with clipping and a guard against non-finite gradients; its state as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@lru_cache
def has_fused_adamw(device: torch.device) -> bool:
    """Whether this build of torch updates weights on the device in one pass."""
    weight = torch.zeros(1, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    try:
        torch.optim.AdamW([weight], fused=True).step()
    except RuntimeError:
        return False
    return True


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips, and skips the update if the gradient is non-finite.

    Gradients are read twice: for their norm, and by the fused kernel, which scales them, updates
    weights and moments, and skips the update if the norm is non-finite. It takes
    scale and verdict from the device, so that nobody waits for them.

    Args:
        grad_clip: largest gradient norm over all groups; 0 switches clipping off.
        fused: whether to use that kernel; None: where there is one.
    """

    def __init__(
        self,
        groups: list[dict],
        grad_clip: float,
        device: torch.device,
        fused: bool | None = None,
    ) -> None:
        fused = has_fused_adamw(device) if fused is None else fused
        super().__init__(groups, lr=1e-3, betas=(0.95, 0.999), fused=fused)
        self._step_supports_amp_scaling = False  # a gradient scaler unscales before `step`
        self.grad_clip = grad_clip
        self.grad_norm: Tensor | float = 0.0
        self.skipped: Tensor | bool = False

    def step(self, closure: Any = None) -> Any:
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p in parameters:
            if p.grad.stride() != p.stride():  # the kernel on CPUs would take it for the weight's
                p.grad = torch.empty_like(p).copy_(p.grad)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.grad_norm, self.skipped = norm, ~torch.isfinite(norm)
        if self.defaults["fused"]:
            self.found_inf = self.skipped.float()
            if self.grad_clip:
                self.grad_scale = ((norm + 1e-6) / self.grad_clip).clamp(min=1)
            super().step(closure)
        elif not self.skipped:
            if self.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
            super().step(closure)


def adamw(groups: list[dict], device: torch.device) -> torch.optim.AdamW:
    """AdamW for DeepSpeed, which clips and guards by itself."""
    fused = has_fused_adamw(device)
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.95, 0.999), fused=fused)


def host_copy(tensor: Tensor) -> Tensor:
    """An fp32 copy on the CPU that no later step changes."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def state_of(stage: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`exp_avg/<name>` and `exp_avg_sq/<name>` of every updated parameter, and `step`, on the
    CPU in fp32."""
    out: dict[str, Tensor] = {}
    for name, parameter in stage.named_parameters():
        moments = optimizer.state.get(parameter)
        if moments and moments["step"] > 0:  # else every update was left out
            for key in MOMENTS:
                out[f"{key}/{name}"] = host_copy(moments[key])
            out["step"] = host_copy(torch.as_tensor(moments["step"])).reshape(())
    return out


def load_state(
    stage: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Takes what `state_of` gave."""
    for name, parameter in stage.named_parameters():
        if f"exp_avg/{name}" in state:
            moments = {k: torch.zeros_like(parameter) for k in MOMENTS}  # laid out as the weight
            for key, moment in moments.items():
                moment.copy_(state[f"{key}/{name}"])
            step = step_count(optimizer, parameter, state)
            optimizer.state[parameter] = {"step": step, **moments}


def step_count(
    optimizer: torch.optim.Optimizer, weight: Tensor, state: Mapping[str, Tensor]
) -> Tensor:
    """The count of updates, where the optimiser wants it: fused kernels read it on the device."""
    return state["step"].clone().to(weight.device if optimizer.defaults.get("fused") else "cpu")
