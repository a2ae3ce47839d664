"""The denoiser of crystal-structure diffusion: CSPNet on top of an encoder's latents.

CSPNet (DiffCSP; Jiao et al., NeurIPS 2023, appendix B.1, with the mean over neighbours and the
layer norms of its code) passes messages over all pairs of a cell's atoms, which see the Fourier
features of the difference of their fractional coordinates and the lattice. These do not change when
the crystal is rotated or translated; the outputs are in fractional and in log-metric coordinates,
which do not either. So it turns the latents of an invariant encoder into directions.

Letters in shapes: A atoms, B crystals, P pairs, D encoder width, H width, F frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.models.layers.basic import WideLinear
from crysforge.models.layers.time_embedding import TIME_CHANNELS, timestep_embedding
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.pairs import Pairs
from crysforge.models.ops.segments import crystal_mean, gather_source, gather_target, segment_sum

STATE = 6
"""Numbers that describe a lattice (log-metric coordinates, datapipe/crystals/lattice.py)."""


@dataclass(kw_only=True)
class CSPNetConfig:
    """Size of the denoiser."""

    width: int = 256
    layers: int = 4
    frequencies: int = 128
    """Waves along each axis, from the constant one up."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "frequencies"):
            if getattr(self, name) < 1:
                raise ValueError(f"denoiser.{name} must be at least 1, got {getattr(self, name)}")


class CSPNet(nn.Module):
    """Noise of the coordinates and of the lattice from what a noised crystal looks like.

    CSPNet's embedding of the elements is replaced by the encoder's latents of the noised crystal:
    what the denoiser knows of elements and surroundings, it knows from the encoder.

    Args:
        config: size.
        dim: width of the encoder.
    """

    def __init__(self, config: CSPNetConfig, dim: int) -> None:
        super().__init__()
        self.frequencies = config.frequencies
        self.input = nn.Linear(dim + TIME_CHANNELS, config.width)
        self.layers = nn.ModuleList(
            CSPLayer(config.width, 6 * config.frequencies) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.coords = WideLinear(config.width, 3, bias=False)
        self.lattice = WideLinear(config.width, STATE, bias=False)

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        frac_coords: Tensor,
        lattice: Tensor,
        batch: Tensor,
        ptr: Tensor,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            latents: [A, D] of the noised crystals.
            t: [B] timesteps, 1..T.
            frac_coords: [A, 3] noised. lattice: [B, 6] noised log-metric coordinates.
            batch: [A] crystal of each atom. ptr: [B+1] first atom of each crystal, then A.
            sizes: B numbers, atoms of each crystal; read from `ptr`, for which a GPU is waited for,
                where they are None.

        Returns:
            [A, 3] of the coordinates' and [B, 6] of the lattice's noise, fp32.
        """
        pairs = Pairs.of(ptr, sizes)
        edges = pairs.edges(ptr)
        waves = fourier(frac_coords[pairs.second] - frac_coords[pairs.first], self.frequencies)
        x = self.input(torch.cat([latents, timestep_embedding(t)[batch]], dim=1))
        for layer in self.layers:
            x = layer(x, waves, lattice[batch], edges)
        x = self.norm(x).float()
        return self.coords(x), self.lattice(crystal_mean(x, ptr))


class CSPLayer(nn.Module):
    """Messages over all pairs, their mean over each atom's pairs, and a residual update."""

    def __init__(self, width: int, waves: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.message = nn.Linear(2 * width + STATE + waves, width)
        self.message_out = nn.Linear(width, width)
        self.update = nn.Sequential(
            nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, x: Tensor, waves: Tensor, lattice: Tensor, edges: Edges) -> Tensor:
        """[A, H] from x [A, H], waves [P, 6F], and each atom's lattice [A, 6]."""
        h = self.norm(x)
        # Blocks of the weight on [target; lattice; source; waves], each where its input lives.
        width = x.shape[1]
        own, source, wave = self.message.weight.split(
            [width + STATE, width, self.message.in_features - 2 * width - STATE], dim=1
        )
        to = F.linear(torch.cat([h, lattice.to(h.dtype)], dim=1), own, self.message.bias)
        messages = F.linear(waves, wave)
        messages = messages + gather_target(to.to(messages.dtype), edges)
        messages = messages + gather_source(F.linear(h, source).to(messages.dtype), edges)
        messages = F.silu(self.message_out(F.silu(messages)))
        degree = edges.ptr.diff()[:, None]
        mean = segment_sum(messages, edges) / degree.to(messages.dtype)
        return x + self.update(torch.cat([h, mean.to(h.dtype)], dim=1))


def fourier(difference: Tensor, frequencies: int) -> Tensor:
    """[P, 3] → [P, 6F]: sines, then cosines of 2π·m·difference, m = 0..F−1, for each axis."""
    m = torch.arange(frequencies, device=difference.device)
    angle = (difference[:, :, None] * (2 * math.pi * m)).flatten(1)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
