"""Attention inside crystals on packed tokens: the padded definition and two paths that never pad.

Letters in shapes: A tokens, B crystals, H heads, D channels of a head.

| path | what it does | where |
|---|---|---|
| `padded` | pads every crystal to the longest and masks: the definition | tests |
| `grouped` | one dense call for each run of crystals of equal size | CPU, fallback on GPU |
| `jagged` | one variable-length call, by torch's jagged nested tensors | GPU |

`auto` takes `jagged` on a GPU where a small trial agrees with the definition, else `grouped`.
"""

from __future__ import annotations

import functools
import itertools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from crysforge.models.ops.edges import RowSum

ATTENTION = ("auto", "grouped", "jagged", "padded")


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the crystals lie in a packed tensor of tokens, known to the host."""

    ptr: Tensor
    """[B+1] int64, first token of each crystal, then A."""
    batch: Tensor
    """[A] int64, crystal of each token."""
    sizes: tuple[int, ...]
    """Tokens of each crystal."""

    @functools.cached_property
    def sums(self) -> RowSum:
        """[B, A]: the sum over each crystal's tokens."""
        return RowSum(torch.arange(len(self.batch), device=self.batch.device), self.ptr)


def by_size(layout: Layout) -> tuple[Layout, Tensor, Tensor]:
    """The layout with crystals of equal size brought together, so that `grouped` has few runs.

    Returns:
        The new layout, the crystals in their new order [B], the tokens in their new order [A].
        Both orders are stable: tokens keep their order inside a crystal.
    """
    sizes = layout.ptr.diff()
    crystals = torch.argsort(sizes, stable=True)
    tokens = torch.argsort(sizes[layout.batch], stable=True)
    rank = torch.empty_like(crystals)
    rank[crystals] = torch.arange(len(crystals), device=crystals.device)
    ptr = torch.nn.functional.pad(sizes[crystals].cumsum(0), (1, 0))
    new = Layout(ptr, rank[layout.batch][tokens], tuple(sorted(layout.sizes)))
    return new, crystals, tokens


def attend(qkv: Tensor, layout: Layout, path: str = "auto") -> Tensor:
    """Softmax attention in which a token sees the tokens of its own crystal.

    Args:
        qkv: [A, 3, H, D] queries, keys and values.
        path: one of `ATTENTION`; all give the same result.

    Returns:
        [A, H, D].
    """
    return _PATHS[resolve(path, qkv, *qkv.shape[2:])](qkv, layout)


def resolve(path: str, x: Tensor, heads: int, channels: int) -> str:
    """What a path means for queries of `heads` heads of `channels` that a linear layer makes of x,
    or under no autocast for x itself."""
    if path != "auto":
        return path
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    return choose(
        x.device, torch.get_autocast_dtype(kind) if autocast else x.dtype, heads, channels
    )


def padded(qkv: Tensor, layout: Layout) -> Tensor:
    """The definition: dense attention over [B, H, longest, D] with a key mask."""
    crystals, longest = len(layout.sizes), max(layout.sizes)
    number = torch.arange(len(qkv), device=qkv.device) - layout.ptr[layout.batch]
    slot = layout.batch * longest + number
    dense = qkv.new_zeros(crystals * longest, *qkv.shape[1:]).index_copy(0, slot, qkv)
    q, k, v = dense.view(crystals, longest, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
    valid = torch.zeros(crystals * longest, dtype=torch.bool, device=qkv.device)
    valid[slot] = True
    mask = valid.view(crystals, 1, 1, longest)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1)[slot]


def grouped(qkv: Tensor, layout: Layout) -> Tensor:
    """One dense call for each run of neighbouring crystals of equal size."""
    runs = [(size, len(list(run))) for size, run in itertools.groupby(layout.sizes)]
    parts = []
    # One split: its backward is one concatenation, where slices would each fill a whole gradient.
    for (size, crystals), part in zip(
        runs, qkv.split([size * crystals for size, crystals in runs]), strict=True
    ):
        q, k, v = part.view(crystals, size, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        parts.append(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def jagged(qkv: Tensor, layout: Layout) -> Tensor:
    """One variable-length call. The lengths are passed in, so that nothing waits for the device."""
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            part.contiguous(),
            layout.ptr,
            min_seqlen=min(layout.sizes),
            max_seqlen=max(layout.sizes),
        ).transpose(1, 2)
        for part in qkv.unbind(1)
    )
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


_PATHS = {"padded": padded, "grouped": grouped, "jagged": jagged}


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, heads: int, channels: int) -> str:
    """What `auto` means for tensors of this kind: `jagged` where a trial on the device runs,
    forward and backward, and agrees with the definition; else `grouped`."""
    if device.type != "cuda":
        return "grouped"
    try:
        error = _trial(device, dtype, heads, channels)
    except (RuntimeError, ValueError) as failure:  # no kernel for this device, dtype or width
        reason = str(failure).splitlines()[0]
    else:
        if error < 0.05:  # rounding in bf16 stays far below, a wrong answer does not
            return "jagged"
        reason = f"it differs from the definition by {error:.1e}"
    logging.getLogger(__name__).warning(
        "variable-length attention is not used on %s (%s): %s", device, dtype, reason
    )
    return "grouped"


def _trial(device: torch.device, dtype: torch.dtype, heads: int, channels: int) -> float:
    """Largest relative difference between `jagged` and `padded`, output and gradient."""
    sizes = (1, 5, 2)
    ptr = torch.tensor([0, 1, 6, 8], device=device)
    batch = torch.tensor([0, 1, 1, 1, 1, 1, 2, 2], device=device)
    generator = torch.Generator().manual_seed(0)  # leaves the global generator alone
    start = torch.randn(8, 3, heads, channels, generator=generator).to(device, dtype)
    results = []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        for path, kind in ((jagged, dtype), (padded, torch.float32)):
            qkv = start.to(kind).requires_grad_()
            out = path(qkv, Layout(ptr, batch, sizes))
            (grad,) = torch.autograd.grad(out.float().square().sum(), qkv)
            results.append((out.detach().float(), grad.float()))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
