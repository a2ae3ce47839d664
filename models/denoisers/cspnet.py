"""The denoiser of crystal-structure diffusion: CSPNet.

CSPNet (DiffCSP; Jiao et al., NeurIPS 2023, appendix B.1, with the mean over neighbours and the
layer norms of its code) passes messages over all pairs of a cell's atoms, which see the Fourier
features of the difference of their fractional coordinates and the lattice. These do not change when
the crystal is rotated or translated.

It is computed in an exact form that forms no pair twice: the node parts of a message's first layer
once per atom, the waves of a difference from tables of its atoms and for i < j alone, since the
cosines of (j, i) are those of (i, j) and the sines their opposites.

Letters in shapes: A atoms, B crystals, Q unordered pairs, D encoder width, H width, F frequencies,
S numbers of a lattice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crysforge.models.denoisers.pair_layout import PairLayout, pair_sum, source_mean
from crysforge.models.layers.basic import WideLinear
from crysforge.models.layers.time_embedding import TIME_CHANNELS, timestep_embedding
from crysforge.models.ops.recompute import LinearOf, applied, linear_of
from crysforge.models.ops.segments import crystal_mean

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


class CSPLayers(nn.Module):
    """The layers of CSPNet and the norm behind them.

    Args:
        width, layers, frequencies: as in `CSPNetConfig`.
        state: S, numbers of a lattice that a message sees.

    Attributes:
        recompute: what the backward pass makes again instead of keeping it, one of `RECOMPUTE`;
            results are equal.
    """

    recompute = "none"

    def __init__(self, width: int, layers: int, frequencies: int, state: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.layers = nn.ModuleList(CSPLayer(width, 6 * frequencies, state) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def propagate(
        self, x: Tensor, frac_coords: Tensor, lattice: Tensor, layout: PairLayout
    ) -> Tensor:
        """Node features [A, H] → [A, H], normalised, of sorted atoms.

        Args:
            frac_coords: [A, 3]. lattice: [B, S]. Both sorted, as `layout` says.
        """
        waves = pair_waves(frac_coords, self.frequencies, layout)
        linear = linear_of if self.recompute == "cheap" else applied
        for layer in self.layers:
            if self.recompute == "blocks" and torch.is_grad_enabled():
                x = checkpoint(
                    layer, x, waves, lattice, layout, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = layer(x, waves, lattice, layout, linear)
        return self.norm(x)


class CSPNet(CSPLayers):
    """Noise of the coordinates and of the lattice from what a noised crystal looks like.

    CSPNet's embedding of the elements is replaced by an encoder's latents of the noised crystal:
    what the denoiser knows of elements and surroundings, it knows from the encoder. Its outputs are
    in fractional and in log-metric coordinates, which do not change with the orientation: so it
    turns the latents of an invariant encoder into directions.

    Args:
        config: size.
        dim: width of the encoder.
    """

    def __init__(self, config: CSPNetConfig, dim: int) -> None:
        super().__init__(config.width, config.layers, config.frequencies, STATE)
        self.input = nn.Linear(dim + TIME_CHANNELS, config.width)
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
        layout = PairLayout.of(batch, ptr, sizes)
        x = self.input(torch.cat([latents, timestep_embedding(t)[batch]], dim=1))
        sort = layout.sort_atoms
        x = self.propagate(sort(x), sort(frac_coords), layout.sort_crystals(lattice), layout)
        x = layout.unsort_atoms(x).float()
        return self.coords(x), self.lattice(crystal_mean(x, ptr))


class CSPLayer(nn.Module):
    """Messages over all pairs, their mean over each atom's pairs, and a residual update."""

    def __init__(self, width: int, waves: int, state: int = STATE) -> None:
        super().__init__()
        self.state = state
        self.norm = nn.LayerNorm(width)
        self.message = nn.Linear(2 * width + state + waves, width)
        self.message_out = nn.Linear(width, width)
        self.update = nn.Sequential(
            nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(
        self,
        x: Tensor,
        waves: tuple[Tensor, Tensor],
        lattice: Tensor,
        layout: PairLayout,
        linear: LinearOf = applied,
    ) -> Tensor:
        """[A, H] from x [A, H], the waves of unordered pairs and the lattices [B, S]."""
        h = self.norm(x)
        width, half = x.shape[1], waves[0].shape[1]
        # Blocks of the weight on [target; lattice; source; sines; cosines], where their input is.
        target, cell, source, sine, cosine = self.message.weight.split(
            [width, self.state, width, half, half], dim=1
        )
        even, odd = F.linear(waves[0], cosine), F.linear(waves[1], sine)
        to = F.linear(h, target) + F.linear(lattice, cell, self.message.bias)[layout.batch]
        kind = even.dtype
        come, own = F.linear(h, source), cosine.sum(1)
        seen = pair_sum(to.to(kind), come.to(kind), even, odd, own.to(kind), layout)
        messages = F.silu(linear(F.silu, self.message_out, seen))
        mean = source_mean(messages, layout)
        return x + self.update(torch.cat([h, mean.to(h.dtype)], dim=1))


def pair_waves(frac_coords: Tensor, frequencies: int, layout: PairLayout) -> tuple[Tensor, Tensor]:
    """Cosines and sines [Q, 3F] of 2π·m·(x_j − x_i), m = 0..F−1 for each axis, from those of the
    sorted atoms' coordinates [A, 3] by the addition theorems. The angles are fp64: m·x has lost
    digits in fp32."""
    m = torch.arange(frequencies, device=frac_coords.device)
    angle = (frac_coords.double()[:, :, None] * (2 * math.pi * m)).flatten(1)
    cosine, sine = angle.cos().to(frac_coords.dtype), angle.sin().to(frac_coords.dtype)
    c_i, c_j = cosine[layout.first], cosine[layout.second]
    s_i, s_j = sine[layout.first], sine[layout.second]
    return torch.addcmul(c_i * c_j, s_i, s_j), torch.addcmul(s_j * c_i, c_j, s_i, value=-1)
