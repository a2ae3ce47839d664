"""Adaptive layer norm and gates: one row of shift, scale and gate a crystal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from crysforge.models.ops.attention import Layout
from crysforge.models.ops.dispatch import Op

EPS = 1e-6
"""Of the layer norms."""


@Op
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    """Layer norm of x [A, D] without its own affine map, then that of the crystal: shift and
    1 + scale, both [B, D]."""
    return per_crystal(F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale, shift, layout)


@Op
def gated_add(x: Tensor, update: Tensor, gate: Tensor, layout: Layout) -> Tensor:
    """x + update · gate: tokens [A, D] with a crystal's gate [B, D], fp32 or wider."""
    return x + per_crystal(update, gate, None, layout)


def per_crystal(x: Tensor, scale: Tensor, shift: Tensor | None, layout: Layout) -> Tensor:
    """x·scale + shift with x [A, D] and one scale and shift [B, D] per crystal.

    Keeps for backward only x and what has B rows, and reduces gradients by segments: no atomics.
    """
    return _PerCrystal.apply(x, scale, shift, layout)


class _PerCrystal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, layout):
        ctx.save_for_backward(x, scale)
        ctx.layout = layout
        out = x * scale.index_select(0, layout.batch)
        return out if shift is None else out.add_(shift.index_select(0, layout.batch))

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        sums, rows = ctx.layout.sums, scale.index_select(0, ctx.layout.batch)
        grad_shift = sums(grad.contiguous()) if ctx.needs_input_grad[2] else None
        return (grad * rows).to(x.dtype), sums(grad * x), grad_shift, None
