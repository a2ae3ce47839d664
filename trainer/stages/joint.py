"""Stage 2 of CrysLDNet: encoder and DiT trained together by latent flow matching."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.graphs.transforms import Transform
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.denoisers.dit import DiT, DiTConfig
from crysforge.models.encoders.base import Encoder
from crysforge.models.generative.flows import Linear
from crysforge.models.generative.guidance import Guidance
from crysforge.models.generative.rows import Packing
from crysforge.models.generative.sampler import Field, Fields, SamplingConfig, sample
from crysforge.models.objectives.flow import T_MIN, centred_noise, flow_losses
from crysforge.models.objectives.vae import (
    DecoderConfig,
    Posterior,
    Reconstruct,
    ReconstructionHeads,
    posterior_noise,
)
from crysforge.models.ops.segments import crystal_mean
from crysforge.trainer.base.tensors import load_into
from crysforge.trainer.stages.base import STAGES, Saved, Stage, Term
from crysforge.trainer.stages.made import Wanted, Watch, made
from crysforge.trainer.stages.vae import MaskingConfig

TIME_BINS = 5
COLLAPSE = 0.1
"""Share of its first value below which the latent variance is a sign of collapse."""


@dataclass(kw_only=True)
class JointConfig(MaskingConfig):
    """Settings of stage 2. The defaults are the released code's, but that it does not clip
    gradients, centres the noise over padding too, and hands on the weights of the least validation
    loss (configs/pretrain/crysldnet.yaml has its choices, docs/fidelity.md all differences)."""

    lr: float = 1e-4
    dit: DiTConfig = field(default_factory=DiTConfig)
    """Size of the denoiser."""
    latent_norm: bool = False
    """Normalises each atom's latents (layer norm without parameters) before the flow. Off as
    published: a softplus leaves them with a mean and a scale."""
    reconstruct: Reconstruct = field(
        default_factory=lambda: Reconstruct(atoms=0.0, coords=0.0, lattice=0.0)
    )
    """Weights of reconstruction losses kept in this stage. All 0 as published; the paper's Table 10
    tries them."""
    retain_decoder: bool = False
    """Whether they go through the bottleneck and the heads of stage 1, which are taken with their
    weights and trained on (with `kl_weight`, in the place of new heads on the flow's latents)."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Heads and errors of the reconstruction; those of stage 1 where they are retained."""
    latent_dim: int | None = None
    """Width of a retained bottleneck, as in stage 1; None is the encoder's."""
    kl_weight: float = 1e-5
    """Weight of a retained bottleneck's divergence."""
    mask_ratio: float = 0.0
    """Share of the atoms whose element is hidden. 0 as published; then the element loss, where it
    is kept, counts all atoms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_dim is not None and self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")
        if self.retain_decoder and not self.reconstruct.active():
            raise ValueError("joint.retain_decoder=true needs a positive weight in reconstruct")


@STAGES.register("joint")
class JointStage(Stage):
    """Encoder → latents Z1 → flow matching with a DiT that predicts Z1.

    Z1 is the encoder's deterministic output, before any bottleneck, and is not detached: gradient
    reaches the encoder through the target and through Zt. So the loss falls when the latents
    shrink, and must not select checkpoints; `latent_variance` is watched instead.

    Terms: `flow`, `flow_t/0.0-0.2` … `flow_t/0.8-1.0` (the same by time), `latent_variance` (mean
    over channels of the variance over the atoms of a batch), `variance_within` (the same within
    each crystal: what is left of it when all atoms of a crystal are alike), and kept reconstruction
    losses. In validation also `robust_loss`, in which the flow's loss counts as a share of the
    variance within crystals: it does not fall when latents shrink or atoms become alike.
    """

    Config = JointConfig
    name = "joint"
    robust = "robust_loss"
    min_atoms = 2  # a single atom has no noise left after centring, hence nothing to denoise

    first_variance: Tensor

    def __init__(self, config: JointConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.denoiser = DiT(config.dit, encoder.dim)
        retained = config.retain_decoder
        latent = (config.latent_dim or encoder.dim) if retained else encoder.dim
        self.posterior = Posterior(encoder.dim, latent) if retained else None
        self.heads = ReconstructionHeads(
            latent, config.reconstruct, config.mask_ratio > 0, config.decoder
        )
        self.weights = {"flow": 1.0, **config.reconstruct.active()}
        if retained:
            self.weights["kl"] = config.kl_weight
        process = Linear(encoder.dim, predicts_clean=True, centred=True)
        self.fields = {"latents": Field(process, True)}
        self.register_buffer("first_variance", torch.zeros(()))  # 0: not seen yet

    def transform(self) -> Transform | None:
        return self.config.mask()

    def forward(self, batch: CrystalBatch) -> dict[str, Term]:
        z1 = z = self.encoder(batch).float()
        if self.config.latent_norm:
            z1 = F.layer_norm(z1, z1.shape[1:])
        at = batch.batch, batch.ptr, batch.atoms_per_crystal or None
        losses, t = flow_losses(self.denoiser, z1, batch.rng_key, *at)
        return {
            "flow": Term(losses.sum(), losses.new_full((), len(losses))),
            **self._decoded(z if self.posterior is not None else z1, batch),
            **_by_time(losses.detach(), t),
            "latent_variance": _variance(z1.detach()),
            "variance_within": _variance_within(z1.detach(), batch),
        }

    def _decoded(self, z: Tensor, batch: CrystalBatch) -> dict[str, Term]:
        """Kept reconstruction losses from the latents, or from the encoder's output."""
        terms = {}
        if self.posterior is not None:
            latents = self.posterior(z)
            z, kl = latents.sample(posterior_noise(batch, latents.mean.shape[1])), latents.kl()
            terms["kl"] = Term(kl.sum(), kl.new_full((), len(kl)))
        return terms | {name: Term(*pair) for name, pair in self.heads(z, batch).items()}

    def denoised(self, batch: CrystalBatch, t: float = 0.5) -> Tensor:
        """What the denoiser makes of the latents at a time, [A, D]; the noise follows from the
        crystals' keys."""
        z1 = self.encoder(batch).float()
        if self.config.latent_norm:
            z1 = F.layer_norm(z1, z1.shape[1:])
        noise = centred_noise(batch.rng_key, batch.batch, batch.ptr, z1.shape[1])
        times = z1.new_full((batch.num_crystals,), t)
        state = (1 - t) * noise + t * z1
        sizes = batch.atoms_per_crystal or None
        return self.denoiser(state, times, batch.batch, batch.ptr, sizes)

    def take(self, before: Saved) -> None:
        """The bottleneck and the heads of stage 1, where they are retained.

        Raises:
            ValueError: the stage before has none, or others.
        """
        if self.posterior is None:
            return
        if before.stage != "vae":
            raise ValueError(
                "joint.retain_decoder=true takes the decoder of stage vae, and "
                f"{before.file.parent} is a stage {before.stage}"
            )
        own = self.config.reconstruct.active()
        heads = before.weights("heads.heads.")
        kept = {name: tensor for name, tensor in heads.items() if name.split(".")[0] in own}
        load_into(self.heads.heads, kept, str(before.file))
        load_into(self.posterior, before.weights("posterior."), str(before.file))

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        flow, within = means.get("flow"), means.get("variance_within")
        if flow is None or within is None:
            return {}
        share = flow / within if within > 0 else math.inf
        return {self.robust: means["loss"] - flow + share}

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
        if self.posterior is not None and self.config.latent_norm:
            raise ValueError("the kept decoder reads latents before joint.latent_norm")
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
                watch(done, settings.steps, lambda: self._crystals(wanted, where, state))

        found = sample(denoise, self.fields, where, settings, None, guidance, after)
        return self._crystals(wanted, where, found)

    @torch.no_grad()
    def _crystals(
        self, wanted: Sequence[Wanted], where: Packing, state: Fields
    ) -> list[Crystal | BadCrystal]:
        z, heads = state["latents"], self.heads.heads
        if self.posterior is not None:
            z = self.posterior(z).mean
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


def _variance_within(latents: Tensor, batch: CrystalBatch) -> Term:
    """Mean over atoms and channels of the squared distance from the mean of the atom's crystal."""
    away = latents - crystal_mean(latents, batch.ptr)[batch.batch]
    squares = away.square().mean(dim=1)
    return Term(squares.sum(), squares.new_full((), len(squares)))


def _variance(latents: Tensor) -> Term:
    """Mean over channels of the variance over atoms, of this rank's part of the batch."""
    one = latents.new_ones(())
    return Term(latents.var(dim=0, correction=0).mean(), one)
