"""Stage 1 of CrysLDM: elements and lattice into latents, coordinates stay (paper 4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysforge.datapipe.crystals.crystal import MAX_Z, Crystal
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.denoisers.lattice_numbers import NATURAL_VOLUME
from crysforge.models.denoisers.pair_layout import PairLayout
from crysforge.models.encoders.base import Encoder
from crysforge.models.encoders.cspnet import LATTICES, CSPEncoder
from crysforge.models.generative.rows import Packing
from crysforge.models.layers.basic import WideLinear
from crysforge.models.objectives.vae import LOGVAR_RANGE, Gaussian
from crysforge.models.ops.keyed_random import derive
from crysforge.models.ops.segments import crystal_mean
from crysforge.trainer.stages.base import STAGES, Stage, StageConfig, Term
from crysforge.trainer.stages.made import Seen

_NOISE = 0xD1  # salt


@dataclass(kw_only=True)
class CrysldmVaeConfig(StageConfig):
    """Settings of stage 1. The paper leaves all of them open; docs/generation.md has what is taken
    from where."""

    latent_dim: int = 8
    """Width of an atom's latents."""
    kl_weight: float = 1e-5
    """Weight of the divergence, summed over channels."""
    lattice_weight: float = 1.0
    """Weight of the lattice's squared error beside the elements' cross entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")
        if not (self.kl_weight >= 0 and self.lattice_weight > 0):
            raise ValueError("kl_weight must not be negative, and lattice_weight be positive")


class LatentCode(nn.Module):
    """Posterior of the latents and their decoder, a second CSPNet that is given the coordinates.

    With `lattice=matrix` the lattice's latent is a 3×3 matrix that turns with the cell, of one
    spread in all directions, as the paper's equation 15 needs it; else six numbers.
    """

    def __init__(self, encoder: CSPEncoder, latent_dim: int) -> None:
        super().__init__()
        self.kind, self.latent_dim = encoder.config.lattice, latent_dim
        self.state = LATTICES[self.kind]
        spread = 1 if self.kind == "matrix" else self.state
        self.atoms = WideLinear(encoder.dim, 2 * latent_dim)
        self.lattice = WideLinear(encoder.dim, self.state + spread)
        self.decoder = CSPEncoder(replace(encoder.config, elements="vector", channels=latent_dim))
        self.elements = WideLinear(encoder.dim, MAX_Z)
        self.cell = WideLinear(encoder.dim, self.state)

    def encode(
        self, latents: Tensor, lattice: Tensor, atoms: Tensor, ptr: Tensor
    ) -> tuple[Gaussian, Gaussian]:
        """Distributions of the latents of atoms [A, D] and lattices [B, S], from an encoder's
        output [A, H] and its lattice coordinates [B, S]."""
        mean, logvar = self.atoms(latents).chunk(2, dim=1)
        pooled = self.lattice(crystal_mean(latents, ptr))
        centre, spread = pooled.split([self.state, pooled.shape[1] - self.state], dim=1)
        if self.kind == "matrix":
            scaled = lattice.view(-1, 3, 3) / natural_edge(atoms)[:, None, None]
            centre = (centre.view(-1, 3, 3) @ scaled).flatten(1)
        spread = spread.clamp(*LOGVAR_RANGE).expand_as(centre)
        return Gaussian(mean, logvar.clamp(*LOGVAR_RANGE)), Gaussian(centre, spread)

    def decode(
        self, z: Tensor, cell: Tensor, frac_coords: Tensor, layout: PairLayout, ptr: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of the elements [A, 118] and lattice coordinates [B, S], matrices in units of
        `natural_edge`, from latents of atoms [A, D] and lattices [B, S]."""
        level = torch.zeros_like(cell[:, 0])
        h = self.decoder.denoise(self.decoder.embed(z), frac_coords, cell, level, layout)
        out = self.cell(crystal_mean(h, ptr))
        if self.kind == "matrix":
            out = (out.view(-1, 3, 3) @ cell.view(-1, 3, 3)).flatten(1)
        return self.elements(h), out


def natural_edge(atoms: Tensor) -> Tensor:
    """[B] edges in Å of cubes of natural volume that hold so many atoms [B]."""
    return (NATURAL_VOLUME * atoms.float()) ** (1 / 3)


@STAGES.register("crysldm_vae")
class CrysldmVaeStage(Stage):
    """Crystal → CSPNet → latents of atoms and lattice → CSPNet, given coordinates → elements and
    lattice.

    Terms: `elements` (cross entropy), `lattice` (squared error of its standardised coordinates),
    `kl_atoms`, `kl_lattice`, `accuracy`.

    Raises:
        ValueError: another encoder than CSPNet.
    """

    Config = CrysldmVaeConfig
    name = "crysldm_vae"
    encoder: CSPEncoder

    def __init__(self, config: CrysldmVaeConfig, encoder: Encoder) -> None:
        super().__init__()
        if not isinstance(encoder, CSPEncoder):
            name = encoder.section["name"]
            raise ValueError(f"stage crysldm_vae needs encoder.name=cspnet, not {name!r}")
        self.config, self.encoder = config, encoder
        self.code = LatentCode(encoder, config.latent_dim)
        self.weights: Mapping[str, float] = {
            "elements": 1.0,
            "lattice": config.lattice_weight,
            "kl_atoms": config.kl_weight,
            "kl_lattice": config.kl_weight,
        }

    def look(self, crystals: Iterable[Crystal]) -> None:
        seen = Seen.of(crystals, self.encoder.config.channels)
        if self.encoder.config.lattice == "log_metric":
            self.encoder.lattice_mean.copy_(seen.lattice_mean)
            self.encoder.lattice_std.copy_(seen.lattice_std)

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        layout = PairLayout.of(batch.batch, batch.ptr, batch.atoms_per_crystal or None)
        atoms, lattices, lattice = posterior(self.encoder, self.code, batch, layout)
        z, cell = draws(atoms, lattices, batch)
        scores, found = self.code.decode(z, cell, batch.frac_coords, layout, batch.ptr)
        goal = lattice
        if self.code.kind == "matrix":
            goal = lattice / natural_edge(batch.ptr.diff())[:, None]
        right = (scores.argmax(1) + 1 == batch.numbers).float()
        entropy = F.cross_entropy(scores, batch.numbers - 1, reduction="none")
        square = (found - goal).square()
        return {
            "elements": _mean(entropy),
            "lattice": _mean(square),
            "kl_atoms": _mean(atoms.kl()),
            "kl_lattice": _mean(lattices.kl()),
            "accuracy": _mean(right),
        }


def posterior(
    encoder: CSPEncoder, code: LatentCode, batch: CrystalBatch, layout: PairLayout
) -> tuple[Gaussian, Gaussian, Tensor]:
    """Distributions of the latents of a batch's atoms and lattices, and its lattice coordinates."""
    atoms = batch.ptr.diff()
    lattice = encoder.describe(batch.lattice, atoms)
    level = torch.zeros_like(lattice[:, 0])
    nodes = encoder.embed(batch.numbers)
    h = encoder.denoise(nodes, batch.frac_coords, lattice, level, layout)
    return *code.encode(h, lattice, atoms, batch.ptr), lattice


def draws(atoms: Gaussian, lattices: Gaussian, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
    """A sample of the latents, by the crystals' keys."""
    key = derive(batch.rng_key, _NOISE)
    where = Packing(key, batch.batch, batch.ptr, (), atoms.mean.dtype)
    out = []
    for name, of_atoms, found in (("atoms", True, atoms), ("lattice", False, lattices)):
        noise = where.rows(name, of_atoms).normal(found.mean.shape[1], 0)
        out.append(found.sample(noise))
    return out[0], out[1]


def _mean(values: Tensor) -> Term:
    values = values.float()
    return Term(values.sum(), values.new_full((), values.numel()))
