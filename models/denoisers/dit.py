"""The denoiser of stage 2: a diffusion transformer (DiT) on packed tokens, one token per atom.

After Peebles and Xie 2023 as used by ADiT and CrysLDNet: adaLN-Zero blocks, conditioned on the
flow time alone. Linear layers run on the packed tokens, attention inside crystals only, and the
modulation is kept per crystal: nothing of shape [A, 6·width] exists.

Letters in shapes: A tokens, B crystals, D width of the transformer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from crysforge.datapipe.common.names import nearest
from crysforge.models.layers.time_embedding import TIME_CHANNELS, time_embedding
from crysforge.models.ops.attention import ATTENTION, Layout, attend, by_size, resolve
from crysforge.models.ops.modulation import gated_add, modulated_norm
from crysforge.models.ops.precision import full_precision
from crysforge.models.ops.recompute import LinearOf, applied, linear_of


@dataclass(kw_only=True)
class DiTConfig:
    """Size of the transformer. The default is DiT-B."""

    width: int = 768
    """Channels of the residual stream."""
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over `width`."""
    index_embed: bool = True
    """Adds a sinusoid of the atom's number within its crystal, as the published code does. Then
    the denoiser depends on the order of atoms; without it, permuting atoms permutes the output."""
    attention: str = "auto"
    """Path of attention: auto, grouped, jagged or padded; all give the same result."""

    def __post_init__(self) -> None:
        if min(self.heads, self.layers) < 1:
            raise ValueError(
                f"dit.heads and dit.layers must be at least 1, got {self.heads} and {self.layers}"
            )
        if self.width < 2 or self.width % 2 or self.width % self.heads:
            raise ValueError(
                f"dit.width must be even and a multiple of dit.heads, "
                f"got width={self.width}, heads={self.heads}"
            )
        if not 1 / self.width <= self.mlp_ratio <= 1000:
            raise ValueError(
                f"dit.mlp_ratio must be above 0 and at most 1000, got {self.mlp_ratio}"
            )
        if self.attention not in ATTENTION:
            raise ValueError(
                f"unknown dit.attention {self.attention!r}: {nearest(self.attention, ATTENTION)}"
            )


SIZES = {
    "tiny": DiTConfig(width=64, layers=2, heads=4),
    "mini": DiTConfig(width=256, layers=4, heads=4),
    "S": DiTConfig(width=384, layers=12, heads=6),
    "B": DiTConfig(width=768, layers=12, heads=12),
    "L": DiTConfig(width=1024, layers=24, heads=16),
}
"""Named sizes: S, B, L as published; `mini` trains on a CPU, `tiny` is for tests."""


class DiT(nn.Module):
    """Predicts clean latents from noisy ones and the flow time; zero at initialisation.

    Args:
        config: size.
        dim: width of the latents, in and out.

    Attributes:
        recompute: what the backward pass makes again instead of keeping it, one of `RECOMPUTE`;
            results are equal. `cheap`: norms, activations and attention; a third less memory.
            `blocks`: all but what enters each block; a third more arithmetic.
    """

    recompute = "none"

    def __init__(self, config: DiTConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.input = nn.Linear(dim, config.width)
        self.time = nn.Sequential(
            nn.Linear(TIME_CHANNELS, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.layers))
        self.final_modulation = nn.Linear(config.width, 2 * config.width)
        self.output = nn.Linear(config.width, dim)
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name.startswith("time."):
                nn.init.normal_(module.weight, std=0.02)
            elif name.endswith("modulation") or name == "output":
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        batch: Tensor,
        ptr: Tensor,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """
        Args:
            x: [A, dim] noisy latents.
            t: [B] flow time in (0, 1), fp32.
            batch: [A] crystal of each token.
            ptr: [B+1] first token of each crystal, then A. No crystal is empty.
            sizes: B numbers, tokens of each crystal; read from `ptr`, for which a GPU is waited
                for, unless given.

        Returns:
            [A, dim] prediction of the clean latents.
        """
        layout = Layout(ptr, batch, tuple(ptr.diff().tolist() if sizes is None else sizes))
        config, order = self.config, None
        path = resolve(config.attention, x, config.heads, config.width // config.heads)
        if path == "grouped" and list(layout.sizes) != sorted(layout.sizes):
            layout, crystals, order = by_size(layout)
            x, t = x[order], t[crystals]
        x = self.input(x)
        if config.index_embed:
            number = torch.arange(len(x), device=x.device) - layout.ptr[layout.batch]
            x = x + index_embedding(number, config.width)
        condition = self.time(time_embedding(t))
        for block in self.blocks:
            if self.recompute == "blocks" and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, condition, layout, path, use_reentrant=False, preserve_rng_state=False
                )
            else:
                linear = linear_of if self.recompute == "cheap" else applied
                x = block(x, condition, layout, path, linear)
        shift, scale = full_precision(self.final_modulation(F.silu(condition))).chunk(2, dim=1)
        x = self.output(modulated_norm(x, shift, scale, layout))
        return x if order is None else torch.empty_like(x).index_copy(0, order, x)


class DiTBlock(nn.Module):
    """One adaLN-Zero transformer block."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )

    def forward(
        self, x: Tensor, condition: Tensor, layout: Layout, path: str, linear: LinearOf = applied
    ) -> Tensor:
        """Tokens [A, D] and the condition [B, D] → tokens [A, D]. `linear` is how a layer is
        applied to a function of its inputs: `applied` or `linear_of`."""
        modulation = full_precision(linear(F.silu, self.modulation, condition)).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        norm = functools.partial(modulated_norm, layout=layout)
        qkv = linear(norm, self.qkv, x, shift1, scale1).view(len(x), 3, self.heads, -1)
        update = linear(lambda qkv: attend(qkv, layout, path).flatten(1), self.project, qkv)
        x = gated_add(x, update, gate1, layout)
        up, activation, down = self.mlp
        update = linear(activation, down, linear(norm, up, x, shift2, scale2))
        return gated_add(x, update, gate2, layout)


def index_embedding(number: Tensor, width: int) -> Tensor:
    """[A] → [A, width]: sines, then cosines of π·number / 2048^(2k/width), k < width/2."""
    k = torch.arange(width // 2, device=number.device)
    angle = number[:, None] * math.pi / 2048 ** (2 * k / width)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
