"""Triton twins of the DiT's modulation: layer norm with a crystal's scale and shift, gated sum.

Forward has one program per token, backward one per crystal, which adds up the crystal's gradients
token by token.

Letters in shapes: A tokens, B crystals, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crysforge.models.ops import modulation
from crysforge.models.ops.attention import Layout


@triton.jit
def _modulate(x, scale, shift, batch, out, means, rstds, D, eps, C: tl.constexpr):
    """out = x̂ · (1 + scale) + shift with the token's crystal's rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    inside = column < D
    crystal = tl.load(batch + row)
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / D
    value = tl.where(inside, value - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    a = tl.load(scale + crystal * D + column, mask=inside, other=0.0)
    b = tl.load(shift + crystal * D + column, mask=inside, other=0.0)
    tl.store(out + row * D + column, value * rstd * (1 + a) + b, mask=inside)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)


@triton.jit
def _modulate_grad(
    x, scale, grad, means, rstds, ptr, dx, dscale, dshift, D, C: tl.constexpr
):  # fmt: skip
    crystal = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    inside = column < D
    a = 1 + tl.load(scale + crystal * D + column, mask=inside, other=0.0)
    by_x = tl.zeros([C], tl.float32)
    plain = tl.zeros([C], tl.float32)
    for row in range(tl.load(ptr + crystal), tl.load(ptr + crystal + 1)):
        at = row * D + column
        mean, rstd = tl.load(means + row), tl.load(rstds + row)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, (value - mean) * rstd, 0.0)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        by_x += g * value
        plain += g
        g *= a
        d = g - tl.sum(g, 0) / D - value * (tl.sum(g * value, 0) / D)
        tl.store(dx + at, d * rstd, mask=inside)
    tl.store(dscale + crystal * D + column, by_x, mask=inside)
    tl.store(dshift + crystal * D + column, plain, mask=inside)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, batch, ptr):
        x, shift, scale = x.contiguous(), shift.float().contiguous(), scale.float().contiguous()
        kind = torch.get_autocast_dtype(x.device.type)
        out = torch.empty_like(x, dtype=kind if torch.is_autocast_enabled(x.device.type) else None)
        means, rstds = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
        if out.numel():
            C = triton.next_power_of_2(x.shape[1])
            _modulate[(len(x),)](
                x, scale, shift, batch, out, means, rstds, x.shape[1], modulation.EPS, C=C
            )
        ctx.save_for_backward(x, scale, means, rstds, ptr)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, scale, means, rstds, ptr = ctx.saved_tensors
        dx, dscale, dshift = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        if dscale.numel():
            C = triton.next_power_of_2(x.shape[1])
            _modulate_grad[(len(scale),)](
                x, scale, grad.contiguous(), means, rstds, ptr, dx, dscale, dshift,
                x.shape[1], C=C,
            )  # fmt: skip
        return dx, dshift, dscale, None, None


@triton.jit
def _gated_add(x, update, gate, batch, out, D, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    inside = column < D
    crystal = tl.load(batch + row)
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(update + row * D + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + crystal * D + column, mask=inside, other=0.0)
    tl.store(out + row * D + column, value + u * g, mask=inside)


@triton.jit
def _gated_add_grad(update, gate, grad, ptr, dupdate, dgate, D, C: tl.constexpr):
    crystal = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    inside = column < D
    gate_row = tl.load(gate + crystal * D + column, mask=inside, other=0.0)
    total = tl.zeros([C], tl.float32)
    for row in range(tl.load(ptr + crystal), tl.load(ptr + crystal + 1)):
        at = row * D + column
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        total += g * tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dupdate + at, g * gate_row, mask=inside)
    tl.store(dgate + crystal * D + column, total, mask=inside)


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, update, gate, batch, ptr):
        update, gate = update.contiguous(), gate.float().contiguous()
        out = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
        if out.numel():
            C = triton.next_power_of_2(x.shape[1])
            _gated_add[(len(x),)](x.contiguous(), update, gate, batch, out, x.shape[1], C=C)
        ctx.save_for_backward(update, gate, ptr)
        ctx.dtype = x.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        update, gate, ptr = ctx.saved_tensors
        grad, dupdate, dgate = grad.contiguous(), torch.empty_like(update), torch.empty_like(gate)
        if dgate.numel():
            D = grad.shape[1]
            C = triton.next_power_of_2(D)
            _gated_add_grad[(len(gate),)](update, gate, grad, ptr, dupdate, dgate, D, C=C)
        return grad.to(ctx.dtype), dupdate, dgate, None, None


@modulation.modulated_norm.has_twin
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    """See `modulation.modulated_norm`; under autocast in the dtype of the product that follows."""
    return _Modulate.apply(x, shift, scale, layout.batch, layout.ptr)


@modulation.gated_add.has_twin
def gated_add(x: Tensor, update: Tensor, gate: Tensor, layout: Layout) -> Tensor:
    """See `modulation.gated_add`."""
    return _GatedAdd.apply(x, update, gate, layout.batch, layout.ptr)
