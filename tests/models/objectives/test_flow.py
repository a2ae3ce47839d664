import pytest
import torch
from torch.nn import functional as F

from crysforge.models.objectives.flow import T_CLAMP, T_MIN, centred_noise, flow_losses, flow_times
from crysforge.models.ops.segments import crystal_mean

SIZES = [3, 1, 6, 2]
DIM = 5


def pack(sizes):
    """batch [A] and ptr [B+1] of crystals of these sizes."""
    sizes = torch.tensor(sizes)
    return torch.arange(len(sizes)).repeat_interleave(sizes), F.pad(sizes.cumsum(0), (1, 0))


@pytest.fixture
def crystals():
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(2**62, (len(SIZES),), generator=generator)
    z1 = torch.randn(sum(SIZES), DIM, generator=generator)
    weight = torch.randn(DIM, DIM, generator=generator)
    return z1, key, *pack(SIZES), weight


def linear_denoiser(weight):
    """Depends on Zt and t, token by token."""
    return lambda zt, t, batch, ptr, sizes=None: zt @ weight * (1 + t[batch, None])


def padded_losses(z1, noise, t, mask, weight):
    """Literal transcription on padded tokens: z1, noise [B, N, D], t [B], mask [B, N] → [B]."""
    noise = noise * mask[..., None]
    noise = noise - noise.sum(1, keepdim=True) / mask.sum(1)[:, None, None]
    zt = ((1 - t)[:, None, None] * noise + t[:, None, None] * z1) * mask[..., None]
    prediction = zt @ weight * (1 + t[:, None, None])
    e = (z1 - prediction) / (1 - torch.minimum(t, torch.tensor(0.9)))[:, None, None]
    e = e * mask[..., None]
    return e.square().sum((1, 2)) / (mask.sum(1) * z1.shape[2])


def test_loss_is_the_padded_transcription(crystals):
    z1, key, batch, ptr, weight = crystals
    losses, t = flow_losses(linear_denoiser(weight), z1, key, batch, ptr)
    mask = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]

    def pad(x):
        out = x.new_zeros(*mask.shape, x.shape[1])
        out[mask] = x
        return out

    noise = centred_noise(key, batch, ptr, DIM)
    want = padded_losses(pad(z1), pad(noise), t, mask, weight)
    assert torch.equal(t, flow_times(key))
    assert torch.allclose(losses, want, rtol=1e-5)


def test_a_perfect_denoiser_has_no_loss_and_a_constant_error_is_weighted_by_time(crystals):
    z1, key, batch, ptr, _ = crystals
    losses, t = flow_losses(lambda *_: z1, z1, key, batch, ptr)
    assert not losses.any()
    losses, t = flow_losses(lambda *_: z1 + 0.5, z1, key, batch, ptr)
    assert torch.allclose(losses, 0.25 / (1 - t.clamp(max=T_CLAMP)) ** 2, rtol=1e-4)


def test_gradient_reaches_the_latents_as_target_and_through_the_path(crystals):
    z1, key, batch, ptr, weight = crystals
    t = flow_times(key)[batch, None]
    noise = centred_noise(key, batch, ptr, DIM)

    def grad(target_flows, path_flows):
        z = z1.clone().requires_grad_()
        target, path = (z if flows else z.detach() for flows in (target_flows, path_flows))
        prediction = linear_denoiser(weight)((1 - t) * noise + t * path, t[ptr[:-1], 0], batch, ptr)
        error = (target - prediction).square().mean(1, keepdim=True)
        loss = crystal_mean(error, ptr)[:, 0] / (1 - t[ptr[:-1], 0].clamp(max=0.9)) ** 2
        loss.sum().backward()
        return z.grad

    z = z1.clone().requires_grad_()
    flow_losses(linear_denoiser(weight), z, key, batch, ptr)[0].sum().backward()
    target, path = grad(True, False), grad(False, True)
    assert target.abs().max() > 1e-3 and path.abs().max() > 1e-3
    assert torch.allclose(z.grad, target + path, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(z.grad, target, rtol=1e-2)
    assert not torch.allclose(z.grad, path, rtol=1e-2)


def test_losses_do_not_depend_on_what_else_is_in_the_batch(crystals):
    z1, key, batch, ptr, weight = crystals
    whole, _ = flow_losses(linear_denoiser(weight), z1, key, batch, ptr)
    for i in reversed(range(len(SIZES))):
        alone, _ = flow_losses(
            linear_denoiser(weight), z1[batch == i], key[i : i + 1], *pack([SIZES[i]])
        )
        assert torch.allclose(alone[0], whole[i], rtol=1e-5)


def test_noise_is_centred_per_crystal_and_normal():
    sizes = [50] * 200
    batch, ptr = pack(sizes)
    noise = centred_noise(torch.arange(200), batch, ptr, 8)
    assert crystal_mean(noise, ptr).abs().max() < 1e-6
    assert noise.var().item() == pytest.approx(1 - 1 / 50, rel=0.02)
    assert noise.pow(4).mean().item() == pytest.approx(3 * (1 - 1 / 50) ** 2, rel=0.05)
    correlation = torch.corrcoef(noise.T) - torch.eye(8)
    assert correlation.abs().max() < 0.05


def test_a_single_atom_has_no_noise():
    assert not centred_noise(torch.arange(3), *pack([1, 1, 1]), 4).any()


def test_times_are_uniform_and_follow_the_key():
    key = torch.arange(20000)
    t = flow_times(key)
    assert t.dtype == torch.float32 and t.min() >= T_MIN and t.max() < 1 - T_MIN
    counts = torch.histc(t, 10, T_MIN, 1 - T_MIN)
    assert (counts - 2000).abs().max() < 250
    assert torch.equal(flow_times(key.flip(0)), t.flip(0))


def test_time_path_and_loss_are_fp32_under_autocast(crystals):
    z1, key, batch, ptr, weight = crystals
    seen = {}

    def denoiser(zt, t, batch, ptr, sizes=None):
        seen.update(zt=zt.dtype, t=t.dtype)
        return zt @ weight

    with torch.autocast("cpu", torch.bfloat16):
        losses, t = flow_losses(denoiser, z1.bfloat16(), key, batch, ptr)
    assert seen == {"zt": torch.float32, "t": torch.float32}
    assert losses.dtype == t.dtype == torch.float32
