"""Objectives that compare crystals with each other, over the global batch whatever the ranks.

Letters in shapes: B crystals of this rank, G crystals of all ranks, D channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.models.ops.norm import BatchNorm, is_synchronised

EPS = 1e-5
"""Added to the variance of a channel, as in batch norm."""


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.start, ctx.length = sum(sizes[: dist.get_rank()]), len(x)
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)  # others may hold it too
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.length], None


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows x [B, …] of all ranks, [G, …] in rank order, and the place of this rank's first row.

    Collective, forward and backward. A row's gradient is the sum of what all ranks' losses say of
    it; ranks may hold any number of rows.
    """
    if not is_synchronised():
        return x, 0
    size = torch.tensor([len(x)], device=x.device)
    all_sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(all_sizes, size)
    sizes = torch.cat(all_sizes).tolist()
    if sum(sizes) == 0:
        return x, 0
    return _GatherRows.apply(x, sizes), sum(sizes[: dist.get_rank()])


def nt_xent(embedding: Tensor, label: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Supervised NT-Xent: crystals with the same label attract each other.

    For an anchor a, the mean over its positives p (other crystals of its label) of
    −log(e^{s_ap} / (e^{s_ap} + Σ_n e^{s_an})), where n are the crystals with other labels and s is
    the cosine over the temperature. An anchor without a positive is left out.

    Args:
        embedding: [B, D] of this rank. label: [B] int64. Positives and negatives come from all
            ranks. Collective.

    Returns:
        Sum over this rank's anchors, and their number; scalars, fp32.
    """
    rows = F.normalize(embedding.float(), dim=1)
    everyone, start = gather_rows(rows)
    labels, _ = gather_rows(label)
    with torch.autocast(rows.device.type, enabled=False):
        similarity = rows @ everyone.T / temperature
    same = label[:, None] == labels
    number = torch.arange(len(everyone), device=rows.device)
    positive = same & (number != number[start : start + len(rows), None])
    lowest = torch.finfo(similarity.dtype).min
    negatives = similarity.masked_fill(same, lowest).logsumexp(dim=1, keepdim=True)
    losses = F.softplus(negatives - similarity) * positive
    count = positive.sum(dim=1)
    return (losses.sum(dim=1) / count.clamp(min=1)).sum(), (count > 0).sum().float()


def barlow_twins(first: Tensor, second: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Barlow Twins (Zbontar et al., ICML 2021): Σ_i (C_ii − 1)² + weight · Σ_{i≠j} C_ij².

    C is the cross-correlation of the channels of two views over all ranks' crystals, in fp32, after
    each crystal's embedding is normalised to length one (as Crystal Twins does).

    Args:
        first, second: [B, D] embeddings of this rank's crystals. Collective.

    Returns:
        The loss times this rank's crystals, and their number; scalars, fp32. So the sum over ranks
        is the loss of the global batch, once for each crystal.
    """
    views = F.normalize(torch.stack([first, second], dim=1).float(), dim=2)
    everyone, _ = gather_rows(views)
    crystals = max(len(everyone), 1)
    with torch.autocast(views.device.type, enabled=False):
        centred = everyone - everyone.sum(dim=0) / crystals
        variance = centred.square().sum(dim=0) / crystals
        standard = centred * torch.rsqrt(variance + EPS)
        correlation = standard[:, 0].T @ standard[:, 1] / crystals
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    loss = (diagonal - 1).square().sum() + weight * off_diagonal
    own = loss.new_full((), len(first))
    return loss * own, own


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """SimSiam's distance (Chen and He, CVPR 2021), [B] fp32: minus the cosine between a prediction
    [B, D] and a target [B, D], which is held fixed."""
    return -F.cosine_similarity(prediction.float(), target.detach().float(), dim=1)


class Projector(nn.Module):
    """From pooled latents to the embedding that Crystal Twins compares: softplus and a linear layer
    as in its backbone's readout, then linear, softplus, linear. With `norm`, a batch norm follows,
    as SimSiam has it: without, all embeddings share a large offset and agree before they learn."""

    def __init__(self, dim: int, norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.norm = BatchNorm(dim) if norm else None

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, D] → [B, D]."""
        for layer in self.layers:
            pooled = layer(F.softplus(pooled))
        return pooled if self.norm is None else self.norm(pooled)


class PredictionHead(nn.Module):
    """SimSiam's predictor: batch norm, and a bottleneck of a quarter of the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(dim // 4, 1)
        self.squeeze, self.norm = nn.Linear(dim, hidden), BatchNorm(hidden)
        self.widen = nn.Linear(hidden, dim)

    def forward(self, z: Tensor) -> Tensor:
        """[B, D] → [B, D]."""
        return self.widen(F.relu(self.norm(self.squeeze(z))))
