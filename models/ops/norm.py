"""Batch normalisation over rows that stand for several equal rows, synchronised over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crysforge.models.ops.dispatch import Op
from crysforge.models.ops.precision import full_precision


class Moments(NamedTuple):
    """First two moments of weighted rows; with a leading dimension, of several parts."""

    total: Tensor
    """Sum of the weights, scalar."""
    mean: Tensor
    """Weighted mean, [D]."""
    m2: Tensor
    """Weighted sum of squared deviations from the mean, [D]."""


@Op
def moments(x: Tensor, weight: Tensor) -> Moments:
    """Moments of x [n, D] (fp32 or fp64) with weights [n]; n may be 0."""
    total = weight.sum()
    mean = (weight @ x) / total.clamp(min=1)
    return Moments(total, mean, weight @ (x - mean).square_())


def merge(parts: Sequence[Moments]) -> Moments:
    """Moments of all parts together (Chan, Golub, LeVeque 1979): no difference of large sums."""
    if len(parts) == 1:
        return parts[0]
    return merged(Moments(*(torch.stack(column) for column in zip(*parts, strict=True))))


def merged(parts: Moments) -> Moments:
    """`merge` of parts that are stacked."""
    totals, means, m2 = parts
    total = totals.sum()
    mean = (totals / total.clamp(min=1)) @ means
    return Moments(total, mean, m2.sum(0) + totals @ (means - mean).square_())


def is_synchronised() -> bool:
    """Whether statistics are shared: a default process group of several ranks exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def merge_over_ranks(local: Moments) -> Moments:
    """Moments of the rows of all ranks. Collective: a rank without rows takes part too."""
    flat = torch.cat([local.total[None], local.mean, local.m2])
    gathered = flat.new_empty(dist.get_world_size() * len(flat))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # newer name
    gather(gathered, flat)
    width = len(local.mean)
    total, mean, m2 = gathered.view(-1, len(flat)).split([1, width, width], dim=1)
    return merged(Moments(total[:, 0], mean, m2))


class Standard(NamedTuple):
    """What normalises a batch: x̂ = (x - mean) · rstd, and the share of each row in the mean."""

    mean: Tensor
    """[D]."""
    rstd: Tensor
    """1 / sqrt(variance + eps), [D]."""
    share: Tensor
    """Weight over total weight of all ranks, [n]; zero where the mean is a constant (eval)."""
    synchronised: bool

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        """The backward pass's sums over all rows of all ranks, in place."""
        if self.synchronised:
            dist.all_reduce(sums)
        return sums


class BatchNorm(nn.Module):
    """`nn.BatchNorm1d` for rows with multiplicities, synchronised over ranks in training.

    In training the result, its gradients and the running statistics are those of
    `nn.BatchNorm1d` on rows repeated `count` times, all ranks' rows together. Parameters, buffers
    and state dict are those of `nn.BatchNorm1d`. Statistics are fp32 under autocast too.
    """

    synchronised = True
    """Whether ranks share their statistics, where there are several."""
    counted = True
    """Whether the rows of this rank enter statistics."""

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, x: Tensor, count: Tensor | None = None) -> Tensor:
        """Normalises x [n, D]; row i stands for count[i] equal rows (default one).

        Raises:
            ValueError: in training, if all ranks together hold a single row of count one.
        """
        with torch.autocast(x.device.type, enabled=False):  # products of moments in full precision
            wide = full_precision(x)
            weight = wide.new_ones(len(x)) if count is None else count.to(wide.dtype)
            parts = [moments(wide.detach(), weight)] if self.training else []
            standard = self.standard(parts, weight)
            return _Normalize.apply(wide, self.weight, self.bias, standard).to(x.dtype)

    @torch.no_grad()
    def standard(self, parts: Sequence[Moments], weight: Tensor) -> Standard:
        """What normalises rows with weights [n] whose moments are the merged parts (training;
        updates the running statistics) or the running statistics (eval, where parts are not used;
        and where no rank has rows that count)."""
        if not self.training:
            mean, var = self.running_mean.to(weight.dtype), self.running_var.to(weight.dtype)
            return Standard(
                mean.clone(), torch.rsqrt(var + self.eps), torch.zeros_like(weight), False
            )
        synchronised = self.synchronised and is_synchronised()
        total, mean, m2 = merge(parts)
        if not self.counted:
            total, mean, m2, weight = (torch.zeros_like(t) for t in (total, mean, m2, weight))
        if synchronised:
            total, mean, m2 = merge_over_ranks(Moments(total, mean, m2))
        if len(weight) <= 1 and total == 1:  # reads the device in this rare case alone
            raise ValueError(
                "batch statistics need more than one row to train on, got 1: "
                "use a larger batch, or eval mode"
            )
        some = total.clamp(min=1)
        step = (total > 0).to(total.dtype) * self.momentum
        unbiased = m2 / (some - 1).clamp(min=torch.finfo(m2.dtype).tiny)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step.to(self.running_mean.dtype))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), step.to(self.running_var.dtype))
        self.num_batches_tracked += 1
        mean = torch.where(total > 0, mean, self.running_mean.to(mean.dtype))
        var = torch.where(total > 0, m2 / some, self.running_var.to(mean.dtype))
        return Standard(mean, torch.rsqrt(var + self.eps), weight / some, synchronised)


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """Rows that pass through do not enter the statistics of the module's batch norms; they are
    normalised by those of the other ranks' rows, or by the running ones."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    for norm in norms:
        norm.counted = False
    try:
        yield
    finally:
        for norm in norms:
            norm.counted = True


class _Normalize(torch.autograd.Function):
    """y = weight · x̂ + bias, whose statistics depend on x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, standard: Standard) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.standard = standard
        centred = x - standard.mean  # first, or a large mean cancels digits
        return centred.mul_(standard.rstd * weight).add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        mean, rstd, share, _ = ctx.standard
        x_hat = (x - mean).mul_(rstd)
        local = torch.stack([grad.sum(0), (grad * x_hat).sum(0)])
        dbias, dweight = local.to(weight.dtype)
        first, second = ctx.standard.sum_over_ranks(local.clone())
        dx = x_hat.mul_(second).add_(first).mul_(share[:, None])
        dx = torch.sub(grad, dx, out=dx).mul_(weight * rstd)
        return dx, dweight, dbias, None
