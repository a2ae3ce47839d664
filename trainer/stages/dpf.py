"""Denoising pretraining (DPF): the clean crystal from one with hidden elements, moved atoms and a
strained cell."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.graphs.noise import (
    NoiseFractions,
    NoiseLattice,
    NoiseLatticeEntries,
    NoisePositions,
)
from crysforge.datapipe.graphs.transforms import Chain, Once, Step, Transform
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders.base import Encoder
from crysforge.models.layers.basic import WideLinear
from crysforge.models.objectives.vae import Reconstruct, ReconstructionHeads
from crysforge.trainer.stages.base import STAGES, Stage, Term
from crysforge.trainer.stages.vae import MaskingConfig

POSITION_TARGETS = ("coordinates", "displacement")
NOISES = ("paper", "released")


@dataclass(kw_only=True)
class DPFConfig(MaskingConfig):
    """Settings of denoising pretraining. Each corruption that is not 0 is applied and has its loss;
    the paper studies them one at a time, the default is all of them together."""

    noise: str = "paper"
    """`paper`: normal noise on Cartesian coordinates and on the six lattice constants, drawn anew
    in every epoch, as masks are. `released`, as in the published code: uniform noise in [0, α) on
    fractional coordinates and in [0, β) on the nine lattice entries; noise and masks are drawn once
    for each crystal."""
    mask_ratio: float = 0.3
    """γ, share of the atoms whose element is hidden; studied: 0.3, 0.5, 0.7."""
    position_noise: float = 0.1
    """α, size of the noise on coordinates: standard deviation in Å (`paper`), or largest share of
    each lattice vector (`released`); studied: 0.1, 0.3, 0.5."""
    lattice_noise: float = 0.1
    """β, size of the noise on the lattice: standard deviation in Å and degrees alike (`paper`), or
    largest noise in Å (`released`); studied: 0.1, 0.3, 0.5."""
    position_target: str = "coordinates"
    """What is predicted of moved atoms: `coordinates`, the clean fractional ones as in the released
    code of this family (an invariant encoder cannot know where the origin is, so a good part of
    this loss stays); or `displacement`, how far each atom was moved, in Å."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise not in NOISES:
            raise ValueError(f"unknown noise {self.noise!r}: {nearest(self.noise, NOISES)}")
        for name in ("position_noise", "lattice_noise"):
            if not 0 <= getattr(self, name) <= 5:
                raise ValueError(f"{name} must be in [0, 5], got {getattr(self, name)}")
        if self.position_target not in POSITION_TARGETS:
            raise ValueError(
                f"position_target must be coordinates or displacement, got {self.position_target!r}"
            )
        if not (self.mask_ratio or self.position_noise or self.lattice_noise):
            raise ValueError(
                "stage dpf needs mask_ratio, position_noise or lattice_noise above 0: "
                "there is nothing to denoise"
            )


@STAGES.register("dpf")
class DPFStage(Stage):
    """Noised crystal → encoder → elements, coordinates (or displacements) and lattice of the clean.

    Terms, each where its corruption is on: `atoms` (cross entropy of the hidden elements) and
    `atom_accuracy`; `coords` (L1 of fractional coordinates) or `displacement` (L1 in Å); `lattice`
    (L1 in Å of the rows a, b, c).
    """

    Config = DPFConfig
    name = "dpf"
    min_atoms = 2

    def __init__(self, config: DPFConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        moved = float(config.position_noise > 0)
        displacement = moved if config.position_target == "displacement" else 0.0
        reconstruct = Reconstruct(
            atoms=float(config.mask_ratio > 0),
            coords=moved - displacement,
            lattice=float(config.lattice_noise > 0),
        )
        self.heads = ReconstructionHeads(encoder.dim, reconstruct, masked_only=True)
        self.displacement = WideLinear(encoder.dim, 1) if displacement else None
        self.weights = reconstruct.active()
        if displacement:
            self.weights["displacement"] = displacement

    def transform(self) -> Transform:
        config, steps = self.config, list[Step]()
        released = config.noise == "released"
        if mask := config.mask():
            steps.append(mask)
        if config.lattice_noise > 0:
            lattice = NoiseLatticeEntries if released else NoiseLattice
            steps.append(lattice(config.lattice_noise))
        if config.position_noise > 0:
            positions = NoiseFractions if released else NoisePositions
            steps.append(positions(config.position_noise))
        chain = Chain(tuple(steps))
        return Once(chain) if released else chain

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        h = self.encoder(batch)
        terms = {name: Term(*pair) for name, pair in self.heads(h, batch).items()}
        if self.displacement is not None:
            error = (self.displacement(h)[:, 0] - displacement(batch)).abs()
            terms["displacement"] = Term(error.sum(), error.new_full((), len(error)))
        return terms


def displacement(batch: CrystalBatch) -> Tensor:
    """How far each atom was moved, [A] in Å, measured in the cell that is seen."""
    moved = batch.seen_frac_coords - batch.frac_coords
    moved = moved - moved.round()  # the shorter way round the cell
    return (moved[:, None] @ batch.seen_lattice[batch.batch])[:, 0].norm(dim=1)
