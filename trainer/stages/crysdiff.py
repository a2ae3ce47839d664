"""CrysDiff: diffusion of coordinates and lattice, denoised from what the encoder sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from crysforge.datapipe.graphs.transforms import Diffuse, Transform
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.denoisers.cspnet import CSPNet, CSPNetConfig
from crysforge.models.encoders.base import Encoder
from crysforge.models.objectives.diffusion import (
    cosine_alpha_bar,
    score_norm,
    wrapped_score,
    wrapped_sigma,
)
from crysforge.trainer.stages.base import STAGES, PretrainingConfig, Stage, Term


@dataclass(kw_only=True)
class CrysDiffConfig(PretrainingConfig):
    """Settings of CrysDiff; schedules are DiffCSP's."""

    timesteps: int = 1000
    """T, levels of noise."""
    coords_weight: float = 1.0
    """Weight of the coordinates' score."""
    lattice_weight: float = 1.0
    """Weight of the lattice's noise."""
    denoiser: CSPNetConfig = field(default_factory=CSPNetConfig)
    """Size of the denoiser."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps < 2:
            raise ValueError(f"timesteps must be at least 2, got {self.timesteps}")
        for name in ("coords_weight", "lattice_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@STAGES.register("crysdiff")
class CrysDiffStage(Stage):
    """Crystal noised to a random level → its graph → encoder → CSPNet → the noise.

    The published denoiser is one network that embeds the noised crystal itself. Here any encoder
    embeds it, from the graph of the noised structure; CSPNet, which sees no elements of its own,
    turns the latents, the noised coordinates and the lattice into noise. The lattice is diffused in
    its log-metric coordinates rather than entry by entry: at every level it is a sound cell of
    which a graph can be built. Coordinates, elements (known) and schedules are as in DiffCSP.

    Terms: `coords` (squared error of the score, normalised at each level) and `lattice` (squared
    error of the noise).
    """

    Config = CrysDiffConfig
    name = "crysdiff"
    min_atoms = 2  # a single atom has no coordinates to tell from others

    sigma: Tensor
    scale: Tensor

    def __init__(self, config: CrysDiffConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.denoiser = CSPNet(config.denoiser, encoder.dim)
        self.weights = {"coords": config.coords_weight, "lattice": config.lattice_weight}
        sigma = wrapped_sigma(config.timesteps)
        scale = torch.cat([sigma.new_ones(1), score_norm(sigma[1:]).rsqrt()])
        self.register_buffer("sigma", sigma.float(), persistent=False)
        self.register_buffer("scale", scale.float(), persistent=False)

    def transform(self) -> Transform:
        steps = self.config.timesteps
        return Diffuse(cosine_alpha_bar(steps).numpy(), wrapped_sigma(steps).numpy())

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        t, state = batch.extras["timestep"], batch.extras["lattice_state"]
        at = batch.batch, batch.ptr, batch.atoms_per_crystal or None
        score, noise = self.denoiser(self.encoder(batch), t, batch.seen_frac_coords, state, *at)
        level = t[batch.batch, None]
        moved = batch.seen_frac_coords - batch.frac_coords
        target = wrapped_score(moved, self.sigma[level]) * self.scale[level]
        coords = (score - target).square()
        lattice = (noise - batch.extras["lattice_noise"]).square()
        return {
            "coords": Term(coords.sum(), coords.new_full((), coords.numel())),
            "lattice": Term(lattice.sum(), lattice.new_full((), lattice.numel())),
        }
