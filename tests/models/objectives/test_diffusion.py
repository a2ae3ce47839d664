"""Schedules of structure diffusion and the score of wrapped normal noise."""

import pytest
import torch

from crysforge.models.objectives.diffusion import (
    SIGMA_RANGE,
    cosine_alpha_bar,
    score_norm,
    wrapped_score,
    wrapped_sigma,
)


def test_schedules_are_diffcsp_s():
    alpha_bar, sigma = cosine_alpha_bar(1000), wrapped_sigma(1000)
    assert alpha_bar[0] == 1 and sigma[0] == 0
    assert (alpha_bar.diff() < 0).all() and alpha_bar[-1] < 1e-8
    assert (sigma[1], sigma[-1]) == pytest.approx(SIGMA_RANGE)
    ratio = sigma[2:] / sigma[1:-1]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_wrapped_score_is_minus_the_gradient_of_the_log_density():
    x = torch.linspace(-1.4, 1.4, 15, dtype=torch.float64, requires_grad=True)
    for sigma in (0.02, 0.2, 0.5):
        shifted = x[:, None] + torch.arange(-30, 31)
        log_density = torch.logsumexp(-shifted.square() / (2 * sigma**2), dim=1).sum()
        (gradient,) = torch.autograd.grad(log_density, x)
        found = wrapped_score(x.detach(), torch.tensor(sigma, dtype=torch.float64))
        torch.testing.assert_close(found, -gradient, rtol=1e-6, atol=1e-6)


def test_score_norm_is_the_mean_square_of_the_score():
    sigma = torch.tensor([0.005, 0.1, 0.3, 0.5], dtype=torch.float64)
    noise = torch.randn(50_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampled = wrapped_score(noise * sigma, sigma).square().mean(0)
    torch.testing.assert_close(score_norm(sigma), sampled, rtol=0.04, atol=0)
