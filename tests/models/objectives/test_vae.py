import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import Sample
from crysforge.datapipe.schema import GraphSpec
from crysforge.models.objectives.vae import (
    LOGVAR_RANGE,
    DecoderConfig,
    Gaussian,
    Posterior,
    Reconstruct,
    ReconstructionHeads,
    posterior_noise,
)

SPEC = GraphSpec(radius=3.0)


def samples(seed=0, sizes=(3, 2, 5)):
    """Random crystals, some atoms masked, each with its own key."""
    rng = np.random.default_rng(seed)
    out = []
    for n in sizes:
        lattice = np.diag(rng.uniform(3, 5, 3)) + rng.uniform(0, 1, (3, 3))
        crystal = Crystal.create("", rng.integers(1, 95, n), rng.random((n, 3)), lattice)
        masked = np.arange(n) < 1 + n // 3
        out.append(Sample(crystal, int(rng.integers(2**62)), rng.permutation(masked), crystal))
    return out


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_kl_is_that_of_torch_and_not_negative():
    latents = Gaussian(randn(50, 7), 3 * randn(50, 7, seed=1))
    reference = kl_divergence(
        Normal(latents.mean, (latents.logvar / 2).exp()), Normal(torch.tensor(0.0), 1.0)
    )
    assert latents.kl().min() >= 0
    assert torch.allclose(latents.kl(), reference.sum(1), rtol=1e-4, atol=1e-4)


def test_kl_of_the_standard_normal_is_zero():
    assert not Gaussian(torch.zeros(4, 7), torch.zeros(4, 7)).kl().any()


def test_samples_have_the_posterior_moments():
    n = 100_000
    latents = Gaussian(torch.tensor([[1.5, -2.0]]), torch.tensor([[0.0, math.log(4)]]))
    z = latents.sample(randn(n, 2))
    assert torch.allclose(z.mean(0), latents.mean[0], atol=0.02)
    assert torch.allclose(z.var(0), torch.tensor([1.0, 4.0]), rtol=0.02)


def test_posterior_is_linear_without_bias_and_bounds_the_variance():
    posterior = Posterior(6, 4)
    assert [tuple(p.shape) for p in posterior.parameters()] == [(8, 6)]
    latents = posterior(1e4 * randn(20, 6))
    assert latents.logvar.min() == LOGVAR_RANGE[0] and latents.logvar.max() == LOGVAR_RANGE[1]
    assert torch.isfinite(latents.kl()).all()
    h = randn(20, 6)
    assert torch.allclose(posterior(2 * h).mean, 2 * posterior(h).mean, rtol=1e-5)


def test_noise_belongs_to_the_crystal():
    parts = samples()
    whole = posterior_noise(build(parts, SPEC), 5)
    alone = [posterior_noise(build([s], SPEC), 5) for s in parts]
    assert torch.equal(whole, torch.cat(alone))
    assert len(whole.unique()) == whole.numel()


def test_heads_are_the_written_losses():
    batch = build(samples(), SPEC)
    heads = ReconstructionHeads(4, Reconstruct(), masked_only=True)
    z = randn(batch.num_atoms, 4)
    out = heads(z, batch)
    total, count = out["atoms"]
    masked = batch.masked
    logits = heads.heads["atoms"](z[masked])
    assert logits.shape[1] == 119
    assert count == masked.sum() < batch.num_atoms
    assert torch.allclose(total, F.cross_entropy(logits, batch.numbers[masked], reduction="sum"))
    right, count = out["atom_accuracy"]
    assert right == (logits.argmax(1) == batch.numbers[masked]).sum() and count == masked.sum()
    total, count = out["coords"]
    coords = heads.heads["coords"](z)
    assert torch.allclose(total / count, (coords - batch.frac_coords).abs().mean(), rtol=1e-5)
    total, count = out["lattice"]
    for b in range(batch.num_crystals):
        pooled = z[batch.batch == b].mean(0)
        total = total - (heads.heads["lattice"](pooled).view(3, 3) - batch.lattice[b]).abs().sum()
    assert count == 9 * batch.num_crystals
    assert total.abs() < 1e-3


def test_the_papers_decoder_squares_errors_behind_two_layers():
    batch, z = build(samples(), SPEC), randn(10, 4)
    kinds = {"coords": ("l1", "mse"), "lattice": ("mse", "l1")}
    for i in range(2):
        errors = {f"{name}_loss": kind[i] for name, kind in kinds.items()}
        decoder = DecoderConfig(heads="mlp", **errors)
        heads = ReconstructionHeads(4, Reconstruct(), masked_only=True, decoder=decoder)
        for head in heads.heads.values():
            assert not torch.allclose(head(2 * z) - head(0 * z), 2 * (head(z) - head(0 * z)))
        mean = torch.stack([p.mean(0) for p in z.split(batch.atoms_per_crystal)])
        guesses = {"coords": heads.heads["coords"](z), "lattice": heads.heads["lattice"](mean)}
        truths = {"coords": batch.frac_coords, "lattice": batch.lattice.flatten(1)}
        for name, (total, count) in heads(z, batch).items():
            if name in kinds:
                error = F.l1_loss if kinds[name][i] == "l1" else F.mse_loss
                torch.testing.assert_close(total / count, error(guesses[name], truths[name]))


def test_only_masked_atoms_count():
    batch = build(samples(), SPEC)
    z = randn(batch.num_atoms, 4).requires_grad_()
    heads = ReconstructionHeads(4, Reconstruct(coords=0, lattice=0), masked_only=True)
    heads(z, batch)["atoms"][0].backward()
    assert torch.equal(z.grad.abs().sum(1) > 0, batch.masked)


def test_all_atoms_count_where_nothing_is_hidden():
    batch = build(samples(), SPEC)
    heads = ReconstructionHeads(4, Reconstruct(coords=0, lattice=0), masked_only=False)
    assert heads(randn(batch.num_atoms, 4), batch)["atoms"][1] == batch.num_atoms


def test_a_batch_without_masked_atoms_has_zero_loss_and_finite_gradient():
    batch = build([s.crystal for s in samples()], SPEC)
    heads = ReconstructionHeads(4, Reconstruct(), masked_only=True)
    total, count = heads(randn(batch.num_atoms, 4), batch)["atoms"]
    assert total == 0 and count == 0
    total.backward()
    assert not heads.heads["atoms"].weight.grad.any()


def test_a_head_without_weight_is_absent():
    heads = ReconstructionHeads(4, Reconstruct(atoms=0, lattice=2), masked_only=True)
    assert set(heads.heads) == {"coords", "lattice"}
    assert set(heads(randn(10, 4), build(samples(), SPEC))) == {"coords", "lattice"}
    with pytest.raises(ValueError, match=r"reconstruct\.coords must not be negative"):
        Reconstruct(coords=-1)


def test_everything_is_fp32_under_autocast():
    batch = build(samples(), SPEC)
    posterior, heads = Posterior(6, 4), ReconstructionHeads(4, Reconstruct(), masked_only=True)
    h = randn(batch.num_atoms, 6)
    z = posterior(h).sample(posterior_noise(batch, 4))
    exact = heads(z, batch)
    with torch.autocast("cpu", torch.bfloat16):
        same = posterior(h).sample(posterior_noise(batch, 4))
        out = heads(same, batch)
    assert torch.equal(z, same)
    for name, (total, count) in out.items():
        assert total.dtype == count.dtype == torch.float32
        assert torch.equal(total, exact[name][0])
