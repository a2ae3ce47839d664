"""AdamW's parameter groups and the one-cycle schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn


def param_groups(
    module: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> list[dict]:
    """Groups for AdamW: biases, norm scales and other vectors are not decayed.

    Args:
        module: only parameters that require a gradient enter.
        weight_decay: for matrices.
        lr_scales: name prefix → factor on the learning rate (discriminative rates).

    Each group carries `lr_scale`; the loop multiplies the scheduled rate with it.
    """
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = next((s for p, s in (lr_scales or {}).items() if name.startswith(p)), 1.0)
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), params in groups.items()
    ]


def one_cycle(
    step: int,
    total: int,
    max_lr: float,
    pct_start: float = 0.3,
    div: float = 25.0,
    final_div: float = 1e4,
    beta1: tuple[float, float] = (0.85, 0.95),
) -> tuple[float, float]:
    """Learning rate and Adam β1 of optimiser step `step` (from 0) of `total`.

    Cosine one-cycle (Smith and Topin 2018) with torch's conventions and defaults: the rate rises
    from max_lr/div in the first `pct_start` of the steps and falls to max_lr/(div·final_div); β1
    moves the other way.
    """
    up_end = pct_start * total - 1
    low, high = beta1
    start, end = max_lr / div, max_lr / (div * final_div)
    if step <= up_end:
        a = _cosine(step / up_end) if up_end > 0 else 0.0
        return start + (max_lr - start) * (1 - a), high + (low - high) * (1 - a)
    a = _cosine(min(1.0, (step - up_end) / max(total - 1 - up_end, 1e-9)))
    return end + (max_lr - end) * a, high + (low - high) * a


def _cosine(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return (1 + math.cos(math.pi * progress)) / 2
