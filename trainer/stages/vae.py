"""Stage 1 of CrysLDNet: the encoder as a variational autoencoder of partly masked crystals."""

from __future__ import annotations

from dataclasses import dataclass, field

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.graphs.transforms import MASKS, Mask, Once, Transform
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.base import Encoder
from crysforge.models.objectives.vae import (
    DecoderConfig,
    Posterior,
    Reconstruct,
    ReconstructionHeads,
    posterior_noise,
)
from crysforge.trainer.stages.base import STAGES, PretrainingConfig, Stage, Term

DRAWN = ("fresh", "fixed")


@dataclass(kw_only=True)
class MaskingConfig(PretrainingConfig):
    """Settings of a stage that hides elements."""

    mask_ratio: float = 0.0
    """Share of the atoms whose element is hidden."""
    mask_unit: str = "atom"
    """What is hidden as one: each `atom` by itself, or an `orbit`, all atoms that the graph cannot
    tell apart. Orbits keep the symmetry that the quotient graph lives on, `mask_ratio` is then a
    mean over draws. An atom that was moved is an orbit of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be in [0, 1], got {self.mask_ratio}")
        if self.mask_unit not in MASKS:
            raise ValueError(
                f"unknown mask_unit {self.mask_unit!r}: {nearest(self.mask_unit, MASKS)}"
            )

    def mask(self, round_up: bool = True) -> Mask | None:
        """What hides the elements, where any are hidden."""
        return MASKS[self.mask_unit](self.mask_ratio, round_up) if self.mask_ratio > 0 else None


@dataclass(kw_only=True)
class VAEConfig(MaskingConfig):
    """Settings of stage 1. The defaults are the released code's, but that masks are drawn anew in
    every epoch and the last weights are handed on (configs/pretrain/crysldnet.yaml has its choices,
    docs/fidelity.md all differences)."""

    mask_ratio: float = 0.3
    """Share of the atoms whose element is hidden; the element loss counts these. 0 hides none and
    counts all."""
    masks: str = "fresh"
    """`fresh` masks in every epoch, or `fixed`: drawn once for each crystal (the released code)."""
    kl_weight: float = 1e-5
    """Weight of the divergence, summed over channels, averaged over atoms."""
    reconstruct: Reconstruct = field(default_factory=Reconstruct)
    """Weights of the reconstruction losses."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Heads and errors of the reconstruction."""
    latent_dim: int | None = None
    """Width of the latents; None is the encoder's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masks not in DRAWN:
            raise ValueError(f"unknown masks {self.masks!r}: {nearest(self.masks, DRAWN)}")
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight must not be negative, got {self.kl_weight}")
        if self.latent_dim is not None and self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")
        if not self.reconstruct.active():
            raise ValueError("stage vae needs a positive weight in reconstruct")


@STAGES.register("vae")
class VAEStage(Stage):
    """Encoder → Gaussian latents → elements, coordinates, lattice.

    Terms: `atoms`, `coords`, `lattice` (those with a weight), `kl`, `atom_accuracy`. Latents are
    sampled in validation too.
    """

    Config = VAEConfig
    name = "vae"
    min_atoms = 2

    def __init__(self, config: VAEConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.latent_dim = config.latent_dim or encoder.dim
        self.posterior = Posterior(encoder.dim, self.latent_dim)
        self.heads = ReconstructionHeads(
            self.latent_dim, config.reconstruct, config.mask_ratio > 0, config.decoder
        )
        self.weights = {**config.reconstruct.active(), "kl": config.kl_weight}

    def transform(self) -> Transform | None:
        mask = self.config.mask()
        return Once(mask) if mask and self.config.masks == "fixed" else mask

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        latents = self.posterior(self.encoder(batch))
        z = latents.sample(posterior_noise(batch, self.latent_dim))
        kl = latents.kl()
        terms = {name: Term(*pair) for name, pair in self.heads(z, batch).items()}
        return {**terms, "kl": Term(kl.sum(), kl.new_full((), len(kl)))}
