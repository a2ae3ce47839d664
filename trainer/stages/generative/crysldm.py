"""Stage 2 of CrysLDM: one diffusion of latents, lattice latents and coordinates (paper 4.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.denoisers.lattice_numbers import from_log_metric
from crysforge.models.denoisers.pair_layout import PairLayout
from crysforge.models.encoders.base import Encoder
from crysforge.models.encoders.cspnet import CSPEncoder, CSPEncoderConfig
from crysforge.models.generative.rows import Packing
from crysforge.models.generative.sampler import Fields, SamplingConfig
from crysforge.trainer.base.tensors import load_into
from crysforge.trainer.stages.base import STAGES, Saved
from crysforge.trainer.stages.generative.ab_initio import (
    AbInitioConfig,
    AbInitioStage,
    only_allowed,
)
from crysforge.trainer.stages.generative.crysldm_vae import (
    LatentCode,
    draws,
    natural_edge,
    posterior,
)
from crysforge.trainer.stages.made import Wanted, made

LOOKED_AT = 512
"""Crystals whose latents say how wide latents are."""


@dataclass(kw_only=True)
class CrysldmConfig(AbInitioConfig):
    """Settings of stage 2; T as sampled in the paper, the rest as in DiffCSP."""

    timesteps: int = 100
    types_weight: float = 1.0
    """Weight of the atoms' latents."""
    latent_dim: int = 8
    """Width of an atom's latents, as in stage 1."""
    denoiser: CSPEncoderConfig = field(
        default_factory=lambda: CSPEncoderConfig(width=512, layers=6)
    )
    """Size of the denoiser; its inputs follow from stage 1."""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(steps=100, method="ancestral", corrector=0.1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.coords, self.lattice, self.types) != ("wrapped_gaussian", "gaussian", "gaussian"):
            raise ValueError("stage crysldm diffuses coords, lattice and types by Gaussian noise")
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")


@STAGES.register("crysldm")
class CrysldmStage(AbInitioStage):
    """Latents of a frozen stage 1 and coordinates → one joint diffusion → decoded crystals.

    The encoder is that of stage 1 and does not learn; the denoiser is a CSPNet of its own. Latents
    are divided by their root mean square over training crystals.

    Raises:
        ValueError: in `take`, a stage before that is not `crysldm_vae`.
    """

    Config = CrysldmConfig
    name = "crysldm"
    config: CrysldmConfig

    atoms_scale: Tensor
    lattice_scale: Tensor

    def __init__(self, config: CrysldmConfig, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.encoder.requires_grad_(False)
        self.code = LatentCode(self.encoder, config.latent_dim).requires_grad_(False)
        self.register_buffer("atoms_scale", torch.ones(()))
        self.register_buffer("lattice_scale", torch.ones(()))
        self._looked: list[Crystal] = []

    def make_trunk(self) -> CSPEncoder:
        inputs: Mapping[str, object] = {
            "elements": "vector",
            "channels": self.config.latent_dim,
            "lattice": self.encoder.config.lattice,
        }
        self.denoiser = CSPEncoder(replace(self.config.denoiser, **inputs))  # type: ignore[arg-type]
        return self.denoiser

    @property
    def trunk(self) -> CSPEncoder:
        return self.denoiser

    def look(self, crystals: Iterable[Crystal]) -> None:
        found = list(crystals)
        super().look(found)
        self._looked = found[:: -(-len(found) // LOOKED_AT)]

    def take(self, before: Saved) -> None:
        if before.stage == self.name:  # goes on from it, stage 1 and scales among it
            load_into(self, before.weights(), str(before.file))
            return
        if before.stage != "crysldm_vae":
            raise ValueError(
                f"stage crysldm needs the latents of stage crysldm_vae, not of {before.stage}: "
                "stages=[crysldm_vae,crysldm]"
            )
        load_into(self.code, before.weights("code."), str(before.file))
        squares: list[list[Tensor]] = [[], []]
        with torch.no_grad():
            for start in range(0, len(self._looked), 64):
                batch = build(self._looked[start : start + 64], self.encoder.graph)
                layout = PairLayout.of(batch.batch, batch.ptr, batch.atoms_per_crystal)
                found = draws(*posterior(self.encoder, self.code, batch, layout)[:2], batch)
                for part, z in zip(squares, found, strict=True):
                    part.append(z.square().flatten())
        for scale, part in zip((self.atoms_scale, self.lattice_scale), squares, strict=True):
            scale.copy_(torch.cat(part).mean().sqrt())
        self._looked = []

    def clean(self, batch: CrystalBatch) -> Fields:
        layout = PairLayout.of(batch.batch, batch.ptr, batch.atoms_per_crystal or None)
        with torch.no_grad():
            z, cell = draws(*posterior(self.encoder, self.code, batch, layout)[:2], batch)
        return {
            "coords": batch.frac_coords,
            "lattice": cell / self.lattice_scale,
            "types": z / self.atoms_scale,
        }

    def crystals(
        self, wanted: Sequence[Wanted], where: Packing, state: Fields
    ) -> list[Crystal | BadCrystal]:
        layout = PairLayout.of(where.batch, where.ptr, where.sizes)
        z, cell = state["types"] * self.atoms_scale, state["lattice"] * self.lattice_scale
        scores, lattice = self.code.decode(z, cell, state["coords"], layout, where.ptr)
        atoms = where.ptr.diff()
        if self.code.kind == "matrix":
            cells = lattice.view(-1, 3, 3) * natural_edge(atoms)[:, None, None]
        else:
            raw = lattice * self.encoder.lattice_std + self.encoder.lattice_mean
            cells = from_log_metric(raw, atoms)
        numbers = only_allowed(scores, wanted).argmax(1) + 1
        return made(wanted, where.sizes, numbers, state["coords"], cells)
