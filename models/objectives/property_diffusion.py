"""CrysDiff's finetuning head: a property as the end of a diffusion that the crystal conditions.

The published network sees the noisy label in its input layer. Here it joins the latents behind the
encoder, so that any encoder serves and one pass of it serves all steps of sampling.

Letters in shapes: N nodes, B crystals, D channels, S samples.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.layers.time_embedding import TIME_CHANNELS, timestep_embedding
from crysforge.models.objectives.diffusion import cosine_alpha_bar
from crysforge.models.ops.keyed_random import keyed_normal, keyed_uniform
from crysforge.models.ops.segments import mean_readout

TIMESTEPS = 100
SAMPLING_STEPS = 50
SAMPLES = 5
LARGEST = 10.0
"""Standardised labels beyond this are taken for errors of the first steps of sampling."""

_TIME, _NOISE = 0x81, 0x82  # salts


class DiffusionReadout(nn.Module):
    """Predicts the noise in a standardised label from the latents, the noisy label and its level;
    labels by denoising."""

    alpha_bar: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.label = nn.Linear(1, dim)
        self.time = nn.Linear(TIME_CHANNELS, dim)
        self.node = nn.Linear(dim, dim)
        self.hidden = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, 1)
        self.register_buffer("alpha_bar", cosine_alpha_bar(TIMESTEPS).float(), persistent=False)

    def noise(self, nodes: Tensor, labels: Tensor, t: Tensor, batch: CrystalBatch) -> Tensor:
        """Noise [B, S] in noisy labels [B, S] at levels t [B], from latents [N, D]."""
        condition = self.label(labels[..., None]) + self.time(timestep_embedding(t))[:, None]
        x = F.silu(self.node(nodes)[:, None] + condition[batch.node_batch])
        pooled = mean_readout(x.flatten(1), batch).view(*labels.shape, -1)
        return self.out(F.silu(self.hidden(pooled)))[..., 0].float()

    def losses(self, nodes: Tensor, labels: Tensor, batch: CrystalBatch) -> Tensor:
        """Squared error of the noise, [B], at a level and with a noise from each crystal's key;
        `labels` [B] are standardised."""
        t = 1 + (TIMESTEPS * keyed_uniform(batch.rng_key, 1, _TIME)[:, 0]).long()
        noise = keyed_normal(batch.rng_key, 1, _NOISE)
        keep = self.alpha_bar[t, None]
        noisy = keep.sqrt() * labels[:, None] + (1 - keep).sqrt() * noise
        return (self.noise(nodes, noisy, t, batch) - noise).square()[:, 0]

    def forward(self, nodes: Tensor, batch: CrystalBatch) -> Tensor:
        """Standardised labels [B, 1]: the mean of samples by DDIM (Song et al., ICLR 2021), which
        start from quantiles of the normal distribution. So a prediction is no draw."""
        place = (torch.arange(SAMPLES, device=nodes.device) + 0.5) / SAMPLES
        y = (2**0.5 * torch.erfinv(2 * place - 1)).expand(batch.num_crystals, -1)
        levels = torch.linspace(TIMESTEPS - 1, 0, SAMPLING_STEPS + 1).round().long().tolist()
        for level, lower in itertools.pairwise(levels):
            t = batch.ptr.new_full((batch.num_crystals,), level)
            keep, after = self.alpha_bar[level], self.alpha_bar[lower]
            noise = self.noise(nodes, y, t, batch)
            clean = ((y - (1 - keep).sqrt() * noise) / keep.sqrt()).clamp(-LARGEST, LARGEST)
            noise = (y - keep.sqrt() * clean) / (1 - keep).sqrt()
            y = after.sqrt() * clean + (1 - after).sqrt() * noise
        return y.mean(dim=1, keepdim=True)
