"""Linear layers whose input is cheap to make anew: they keep what it is made of instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RECOMPUTE = ("none", "cheap", "blocks")
"""What a model may make again in the backward pass: nothing, what `linear_of` can, or whole blocks.
"""

LinearOf = Callable[..., Tensor]
"""`applied` or `linear_of`: (function, layer, *inputs) → layer(function(*inputs))."""


def applied(function: Callable[..., Tensor], layer: nn.Linear, *inputs: Tensor) -> Tensor:
    """`layer(function(*inputs))`; autograd keeps what it likes to."""
    return layer(function(*inputs))


def linear_of(function: Callable[..., Tensor], layer: nn.Linear, *inputs: Tensor) -> Tensor:
    """The same, but only the inputs are kept, and the backward pass runs the function again.

    Args:
        function: of the inputs alone as far as gradients go, without randomness.
        inputs: at least one; the result of the function is [n, in] with its rows.
    """
    return _LinearOf.apply(function, layer.weight, layer.bias, *inputs)


class _LinearOf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], weight: Tensor, bias: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.function, kind = function, weight.device.type
        ctx.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.save_for_backward(weight, *inputs)
        return F.linear(function(*inputs), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        inputs = [
            x.detach().requires_grad_(needed)
            for x, needed in zip(saved, ctx.needs_input_grad[3:], strict=True)
        ]
        cast = {"dtype": ctx.autocast, "enabled": ctx.autocast is not None}
        with torch.enable_grad(), torch.autocast(weight.device.type, **cast):
            made = ctx.function(*inputs)
        grad_made = (grad @ weight.to(grad.dtype)).to(made.dtype)
        wanted = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(made, wanted, grad_made) if wanted else ())
        return (
            None,
            (grad.t() @ made.detach().to(grad.dtype)).to(weight.dtype),
            grad.sum(0).to(weight.dtype),
            *(next(found) if x.requires_grad else None for x in inputs),
        )
