"""The bottleneck and the reconstruction heads of stage 1 (CrysLDNet, paper 3.2; by default single
linear layers and L1 as in the released code).

Everything here is small and runs in fp32, autocast or not. Losses come as (sum, count) pairs, so
that a mean over several batches or ranks is the sum of sums over the sum of counts.

Letters in shapes: A atoms, B crystals, D width of the encoder, L width of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.schema import MAX_Z, CrystalBatch
from crysforge.models.layers.basic import WideLinear
from crysforge.models.ops.keyed_random import derive, keyed_normal, member_keys

LOGVAR_RANGE = (-30.0, 20.0)

_NOISE = 0x73  # salt

Sum = tuple[Tensor, Tensor]
"""A quantity to be averaged: sum and count, scalar fp32 tensors."""


class Gaussian(NamedTuple):
    """Independent normal distributions with `mean` and log-variance `logvar`, both [A, L]. A tuple,
    because ZeRO-3 must find the tensors in what a module returns."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + σ·noise, [A, L]."""
        return self.mean + torch.exp(self.logvar / 2) * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal, summed over channels, [A]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=1)


class Posterior(nn.Module):
    """Encoder output [A, D] → distribution of the latents [A, L]; one linear layer, no bias."""

    def __init__(self, dim: int, latent: int) -> None:
        super().__init__()
        self.linear = WideLinear(dim, 2 * latent, bias=False)

    def forward(self, h: Tensor) -> Gaussian:
        mean, logvar = self.linear(h).chunk(2, dim=1)
        return Gaussian(mean, logvar.clamp(*LOGVAR_RANGE))


def posterior_noise(batch: CrystalBatch, latent: int) -> Tensor:
    """The standard normal noise of a batch's latents, fp32 [A, L], from the crystals' keys."""
    return keyed_normal(
        member_keys(derive(batch.rng_key, _NOISE), batch.batch, batch.ptr), latent, 0
    )


@dataclass(kw_only=True)
class Reconstruct:
    """Weights of the reconstruction losses; 0 leaves the head out."""

    atoms: float = 1.0
    """Cross entropy of the element."""
    coords: float = 1.0
    """Error of the fractional coordinates."""
    lattice: float = 1.0
    """Error of the lattice vectors."""

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not weight >= 0:
                raise ValueError(f"reconstruct.{name} must not be negative, got {weight}")

    def active(self) -> dict[str, float]:
        """Losses that are on, with their weights."""
        return {name: weight for name, weight in vars(self).items() if weight > 0}


HEADS, ERRORS = ("linear", "mlp"), ("l1", "mse")


@dataclass(kw_only=True)
class DecoderConfig:
    """How latents are decoded; the defaults are the released code's."""

    heads: str = "linear"
    """`linear`, one layer for each of elements, coordinates and lattice; or `mlp`, two with a SiLU
    between, as wide as the latents (the paper has MLPs and does not say of what size)."""
    coords_loss: str = "l1"
    """`l1` or `mse` (the paper), of fractional coordinates."""
    lattice_loss: str = "l1"
    """`l1`, in Å, or `mse` (the paper), in Å², of the elements of the lattice."""

    def __post_init__(self) -> None:
        known = {"heads": HEADS, "coords_loss": ERRORS, "lattice_loss": ERRORS}
        for name, value in vars(self).items():
            if value not in known[name]:
                raise ValueError(f"unknown {name} {value!r}: {nearest(value, known[name])}")

    def head(self, latent: int, outputs: int) -> nn.Module:
        """[n, latent] → [n, outputs]."""
        if self.heads == "linear":
            return WideLinear(latent, outputs)
        return nn.Sequential(WideLinear(latent, latent), nn.SiLU(), WideLinear(latent, outputs))


class ReconstructionHeads(nn.Module):
    """Elements, coordinates and lattice from latents; only the heads whose weight is not 0.

    Args:
        latent: width of the latents.
        weights: which heads there are.
        masked_only: whether the element loss counts masked atoms alone (the released code) or all
            atoms (the paper's Alg. 1, for inputs that hide nothing).
        decoder: kind of heads and of errors.
    """

    def __init__(
        self,
        latent: int,
        weights: Reconstruct,
        masked_only: bool,
        decoder: DecoderConfig | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder or DecoderConfig()
        outputs = {"atoms": MAX_Z + 1, "coords": 3, "lattice": 9}
        self.heads = nn.ModuleDict(
            {name: self.decoder.head(latent, outputs[name]) for name in weights.active()}
        )
        self.masked_only = masked_only

    def forward(self, z: Tensor, batch: CrystalBatch) -> dict[str, Sum]:
        """Loss of each head and, with elements, `atom_accuracy`.

        `atoms`: cross entropy in nats per counted atom. `coords`: |x̂ − x| per coordinate, x in
        [0, 1). `lattice`: |L̂ − L| in Å per element of the 3×3 matrix of rows a, b, c. Both squared
        where the decoder's errors are `mse`.
        """
        out: dict[str, Sum] = {}
        if "atoms" in self.heads:
            out.update(self._atoms(self.heads["atoms"](z), batch))
        if "coords" in self.heads:
            out["coords"] = _error(
                self.heads["coords"](z), batch.frac_coords, self.decoder.coords_loss
            )
        if "lattice" in self.heads:
            pooled = torch.segment_reduce(z.float(), "mean", offsets=batch.ptr)
            lattice = self.heads["lattice"](pooled)
            out["lattice"] = _error(lattice, batch.lattice.flatten(1), self.decoder.lattice_loss)
        return out

    def _atoms(self, logits: Tensor, batch: CrystalBatch) -> dict[str, Sum]:
        counted = batch.masked if self.masked_only else torch.ones_like(batch.masked)
        counted = counted.float()
        loss = F.cross_entropy(logits, batch.numbers, reduction="none")
        correct = (logits.argmax(dim=1) == batch.numbers).float()
        count = counted.sum()
        return {
            "atoms": ((loss * counted).sum(), count),
            "atom_accuracy": ((correct * counted).sum(), count),
        }


def _error(prediction: Tensor, target: Tensor, kind: str) -> Sum:
    error = (prediction - target).abs() if kind == "l1" else (prediction - target).square()
    return error.sum(), error.new_full((), error.numel())
