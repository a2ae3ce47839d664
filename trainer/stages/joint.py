"""Stage 2 of CrysLDNet: encoder and DiT trained together by latent flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.graphs.transforms import MaskAtoms, Transform
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.denoisers.dit import DiT, DiTConfig
from crysforge.models.encoders.base import Encoder
from crysforge.models.generative.flows import Linear
from crysforge.models.generative.guidance import Guidance
from crysforge.models.generative.rows import Packing
from crysforge.models.generative.sampler import Field, Fields, SamplingConfig, sample
from crysforge.models.objectives.flow import T_MIN, flow_losses
from crysforge.models.objectives.vae import Reconstruct, ReconstructionHeads
from crysforge.models.ops.segments import crystal_mean
from crysforge.trainer.stages.base import STAGES, Stage, StageConfig, Term, Wanted, Watch
from crysforge.trainer.stages.made import made
from crysforge.trainer.stages.vae import check_mask_ratio

TIME_BINS = 5
COLLAPSE = 0.1
"""Share of its first value below which the latent variance is a sign of collapse."""


@dataclass(kw_only=True)
class JointConfig(StageConfig):
    """Settings of stage 2; the defaults are the released code's."""

    lr: float = 1e-4
    dit: DiTConfig = field(default_factory=DiTConfig)
    """Size of the denoiser."""
    latent_norm: bool = False
    """Normalises each atom's latents (layer norm without parameters) before the flow. Off as
    published: a softplus leaves them with a mean and a scale."""
    reconstruct: Reconstruct = field(
        default_factory=lambda: Reconstruct(atoms=0.0, coords=0.0, lattice=0.0)
    )
    """Weights of reconstruction losses kept in this stage, decoded from the flow's latents. All 0
    as published; the paper's Table 10 tries them."""
    mask_ratio: float = 0.0
    """Share of the atoms whose element is hidden. 0 as published; then the element loss, where it
    is kept, counts all atoms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mask_ratio(self.mask_ratio)


@STAGES.register("joint")
class JointStage(Stage):
    """Encoder → latents Z1 → flow matching with a DiT that predicts Z1.

    Z1 is the encoder's deterministic output, before any bottleneck, and is not detached: gradient
    reaches the encoder through the target and through Zt. So the loss falls when the latents
    shrink, and must not select checkpoints; `latent_variance` is watched instead.

    Terms: `flow`, `flow_t/0.0-0.2` … `flow_t/0.8-1.0` (the same by time), `latent_variance` (mean
    over channels of the variance over the atoms of a batch), and kept reconstruction losses.
    """

    Config = JointConfig
    name = "joint"
    min_atoms = 2  # a single atom has no noise left after centring, hence nothing to denoise

    first_variance: Tensor

    def __init__(self, config: JointConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.denoiser = DiT(config.dit, encoder.dim)
        self.heads = ReconstructionHeads(
            encoder.dim, config.reconstruct, masked_only=config.mask_ratio > 0
        )
        self.weights = {"flow": 1.0, **config.reconstruct.active()}
        process = Linear(encoder.dim, predicts_clean=True, centred=True)
        self.fields = {"latents": Field(process, True)}
        self.register_buffer("first_variance", torch.zeros(()))  # 0: not seen yet

    def transform(self) -> Transform | None:
        return MaskAtoms(self.config.mask_ratio) if self.config.mask_ratio > 0 else None

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        z1 = self.encoder(batch).float()
        if self.config.latent_norm:
            z1 = F.layer_norm(z1, z1.shape[1:])
        at = batch.batch, batch.ptr, batch.atoms_per_crystal or None
        losses, t = flow_losses(self.denoiser, z1, batch.rng_key, *at)
        terms = {name: Term(*pair) for name, pair in self.heads(z1, batch).items()}
        return {
            "flow": Term(losses.sum(), losses.new_full((), len(losses))),
            **terms,
            **_by_time(losses.detach(), t),
            "latent_variance": _variance(z1.detach()),
        }

    # Sampling: the heads that are kept turn latents that the flow makes into crystals

    def own_sampling(self) -> SamplingConfig:
        return SamplingConfig(steps=100)

    def sizes(self, keys: Tensor) -> list[int]:
        raise ValueError("stage joint does not know how large cells are: give atoms=N")

    def draw(
        self,
        wanted: Sequence[Wanted],
        sampling: SamplingConfig | None = None,
        guidance: Guidance | None = None,
        watch: Watch | None = None,
    ) -> list[Crystal | BadCrystal]:
        if missing := {"atoms", "coords", "lattice"} - set(self.config.reconstruct.active()):
            raise ValueError(
                f"this run has no heads for {', '.join(sorted(missing))}: crystals need weights in "
                "joint.reconstruct (configs/pretrain/latent_flow.yaml)"
            )
        if any(w.numbers or w.elements for w in wanted) or not all(w.atoms > 1 for w in wanted):
            raise ValueError("stage joint chooses elements itself, for two atoms and more")
        device = self.first_variance.device
        key = torch.tensor([w.key for w in wanted], device=device)
        where = Packing.of(key, [w.atoms for w in wanted])
        settings, done = sampling or self.own_sampling(), 0

        def denoise(state: Fields, level: Tensor) -> Fields:
            t = (1 - level).clamp(T_MIN, 1 - T_MIN)
            found = self.denoiser(state["latents"], t, where.batch, where.ptr, where.sizes)
            return {"latents": found.float()}

        def after(level: float, state: Fields) -> None:
            nonlocal done
            done += 1
            if watch is not None:
                watch(done, settings.steps, lambda: self._decoded(wanted, where, state))

        found = sample(denoise, self.fields, where, settings, None, guidance, after)
        return self._decoded(wanted, where, found)

    @torch.no_grad()
    def _decoded(
        self, wanted: Sequence[Wanted], where: Packing, state: Fields
    ) -> list[Crystal | BadCrystal]:
        z, heads = state["latents"], self.heads.heads
        numbers = heads["atoms"](z)[:, 1:].argmax(1) + 1  # 0 is no element
        cells = heads["lattice"](crystal_mean(z, where.ptr)).view(-1, 3, 3)
        return made(wanted, where.sizes, numbers, heads["coords"](z), cells)

    def warnings(self, means: Mapping[str, float]) -> list[str]:
        variance = means.get("latent_variance")
        if variance is None:
            return []
        first = float(self.first_variance)
        if first == 0:
            self.first_variance.fill_(variance)
        elif variance < COLLAPSE * first:
            return [
                f"the latents are collapsing: their variance is {variance:.3g}, "
                f"{variance / first:.0%} of the first value {first:.3g}; "
                "lower the learning rate or set joint.latent_norm=true"
            ]
        return []


def _by_time(losses: Tensor, t: Tensor) -> dict[str, Term]:
    """Losses [B] averaged apart for each fifth of the times [B]."""
    bins = torch.arange(TIME_BINS, device=t.device)
    inside = ((t[:, None] * TIME_BINS).long() == bins).float()
    sums, counts = (inside * losses[:, None]).sum(0), inside.sum(0)
    return {
        f"flow_t/{i / TIME_BINS:.1f}-{(i + 1) / TIME_BINS:.1f}": Term(sums[i], counts[i])
        for i in range(TIME_BINS)
    }


def _variance(latents: Tensor) -> Term:
    """Mean over channels of the variance over atoms, of this rank's part of the batch."""
    one = latents.new_ones(())
    return Term(latents.var(dim=0, correction=0).mean(), one)
