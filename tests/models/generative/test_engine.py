"""Samplers reach known distributions, and draws belong to a sample alone."""

from __future__ import annotations

import math

import pytest
import torch

from crysforge.models.generative.diffusions import GaussianDiffusion, WrappedDiffusion
from crysforge.models.generative.flows import Linear, MaskedDiscrete, TorusLinear
from crysforge.models.generative.guidance import Guidance
from crysforge.models.generative.process import Move
from crysforge.models.generative.rows import Packing
from crysforge.models.generative.sampler import Field, SamplingConfig, sample
from crysforge.models.objectives.diffusion import wrapped_score

CENTRES = torch.tensor([0.1, 0.35, 0.8], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
WIDTH = 0.03
"""A mixture of wrapped normals on the circle."""
BINS = 24


def packing(count, size=1, first=0):
    return Packing.of(torch.arange(first, first + count) * 7919 + 13, [size] * count, torch.float64)


def density(x, spread):
    """Of the mixture whose parts have a standard deviation; [n, parts]."""
    away = x[:, None, None] - CENTRES[:, None] + torch.arange(-8, 9)
    return torch.exp(-(away**2) / (2 * spread**2)).sum(2) / (spread * math.sqrt(2 * math.pi))


def check_histogram(x):
    """A χ² test at 5 standard deviations against the mixture's exact shares of bins."""
    fine = (torch.arange(BINS * 50, dtype=torch.float64) + 0.5) / (BINS * 50)
    expected = (density(fine, WIDTH) * SHARES).sum(1).view(BINS, 50).mean(1) / BINS
    expected = len(x) * expected / expected.sum()
    found = torch.histc(x, BINS, 0, 1)
    keep = expected > 5
    chi = ((found - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = int(keep.sum()) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom), (found, expected)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(steps=200, method="ancestral"),
        SamplingConfig(steps=60, method="ancestral", corrector=0.2),
        SamplingConfig(steps=300, method="euler"),
    ],
    ids=["ancestral", "corrected", "flow"],
)
def test_wrapped_diffusion_reaches_a_mixture_on_the_torus(sampling):
    process = WrappedDiffusion(1, 600)

    def exact(fields, level):
        x, index = fields["x"][:, 0], (level * 600).round().long()
        spread = (WIDTH**2 + process.sigma[index] ** 2).sqrt()
        share = density(x, float(spread[0])) * SHARES
        share = share / share.sum(1, keepdim=True)
        score = wrapped_score(x[:, None] - CENTRES, spread[:, None])
        return {"x": (share * score).sum(1, keepdim=True) / process.scale[index][:, None]}

    found = sample(exact, {"x": Field(process, True)}, packing(4000), sampling)["x"][:, 0]
    check_histogram(found)


def test_torus_flow_reaches_a_mixture():
    process = TorusLinear(1, centred=False)
    points = torch.arange(300, dtype=torch.float64) / 300
    weight = (density(points, WIDTH) * SHARES).sum(1)

    def exact(fields, level):
        """The mean way to the points that can have led here: those within half a level."""
        away = points - fields["x"]
        away = (away - away.round()) / level[:, None]
        share = weight * (away.abs() <= 0.5)
        return {"x": (share * away).sum(1, keepdim=True) / share.sum(1, keepdim=True)}

    fields = {"x": Field(process, True)}
    for method in ("euler", "heun"):
        sampling = SamplingConfig(steps=60, method=method)
        check_histogram(sample(exact, fields, packing(800), sampling)["x"][:, 0])


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_a_normal_distribution_is_reached(kind):
    mean, spread, levels = 1.5, 0.4, 400
    process = GaussianDiffusion(2, levels) if kind == "gaussian" else Linear(2)

    def exact(fields, level):
        x, u = fields["x"], level[:, None]
        if kind == "gaussian":
            keep = process.alpha_bar[(u * levels).round().long()]
            signal, noise = keep.sqrt(), (1 - keep).sqrt()
        else:
            signal, noise = 1 - u, u
        variance = signal**2 * spread**2 + noise**2
        epsilon = noise * (x - signal * mean) / variance
        clean = mean + signal * spread**2 * (x - signal * mean) / variance
        return {"x": epsilon if kind == "gaussian" else clean - epsilon}

    fields = {"x": Field(process, False)}
    methods = ["ancestral", "euler"] if kind == "gaussian" else ["euler", "heun"]
    for method in methods:
        x = sample(exact, fields, packing(4000), SamplingConfig(steps=200, method=method))["x"]
        error = 5 * spread / math.sqrt(4000)
        assert x.shape == (4000, 2)
        assert ((x.mean(0) - mean).abs() < error + 0.01).all()
        assert ((x.std(0) - spread).abs() < error + 0.01).all()


def test_masked_classes_are_uncovered_by_their_shares():
    share = torch.tensor([0.6, 0.1, 0.3])

    def exact(fields, level):
        return {"x": share.log().expand(len(fields["x"]), 3)}

    fields = {"x": Field(MaskedDiscrete(3), True)}
    x = sample(exact, fields, packing(3000, 2), SamplingConfig(steps=20))["x"]
    found = torch.bincount(x, minlength=4)
    assert found[0] == 0
    expected = len(x) * share
    assert (((found[1:] - expected) ** 2 / expected).sum()) < 20


def test_the_target_is_the_way_back():
    """A step down to zero along the exact target, as long as it may be, ends at the clean field."""
    where = packing(3, 4)
    for process in (TorusLinear(3, centred=False), Linear(3), Linear(3, predicts_clean=True)):
        rows = where.rows("x", True)
        clean = rows.uniform(3, 99)
        level = torch.full((12, 1), 0.7, dtype=torch.float64)
        x, target = process.corrupt(clean, level, rows)
        for slope in (0.0, 50.0):
            back = process.step(x, target, Move(0.7, 0.0, slope=slope), rows)
            torch.testing.assert_close(back, clean)
            part = process.step(x, target, Move(0.7, 0.3, slope=50.0), rows)
            torch.testing.assert_close(part, clean)  # clamped at the end


def noise_of_everything(fields, level):
    """A denoiser that mixes the members of a group, and not groups."""
    x = fields["x"]
    return {"x": torch.sin(5 * x) * level[0], "y": fields["y"] * 0.5}


def test_draws_belong_to_a_sample_alone():
    fields = {
        "x": Field(WrappedDiffusion(3, 50), True),
        "y": Field(GaussianDiffusion(6, 50), False),
    }
    sampling = SamplingConfig(steps=25, method="ancestral", corrector=0.3)

    def drawn(keys, dtype=torch.float32):
        where = Packing.of(torch.tensor(keys), [2 + k % 3 for k in keys], dtype)
        found = sample(noise_of_everything, fields, where, sampling)
        cut = found["x"].split(list(where.sizes))
        return {k: (x, y) for k, x, y in zip(keys, cut, found["y"], strict=True)}

    every = drawn([5, 3, 8, 1, 13, 21, 34])
    for part in ([8, 5], [34], [21, 1, 3, 13]):
        for key, (x, y) in drawn(part).items():
            assert torch.equal(x, every[key][0]) and torch.equal(y, every[key][1])
    assert not torch.equal(every[5][0][:2], every[8][0][:2])


def test_guidance_is_the_gradient_and_lowers_the_energy():
    def energy(state, level, where):
        return (state["x"] - 3).square().sum(1) * state["y"][:, 0].cos()

    state = {"x": torch.randn(5, 2).double(), "y": torch.randn(5, 1).double()}
    level, small = torch.ones(5).double(), 1e-6
    found = Guidance(energy, 2.0, ["x", "y"]).gradients(state, level, packing(5))
    for name in state:
        for column in range(state[name].shape[1]):
            up, down = (dict(state), dict(state))
            step = torch.zeros_like(state[name])
            step[:, column] = small
            up[name], down[name] = state[name] + step, state[name] - step
            slope = (energy(up, level, None) - energy(down, level, None)) / (2 * small)
            torch.testing.assert_close(found[name][:, column], 2 * slope, rtol=1e-5, atol=1e-6)

    def toward(state, level, where):
        return (state["x"] - 3).square().sum(1)

    fields = {"x": Field(GaussianDiffusion(2, 100), False)}
    sampling = SamplingConfig(steps=100, method="ancestral")
    free, guided = (
        sample(lambda f, u: {"x": f["x"]}, fields, packing(200), sampling, guidance=g)["x"]
        for g in (None, Guidance(toward, 0.5, ["x"]))
    )
    assert (guided - 3).square().mean() < 0.8 * (free - 3).square().mean()


@pytest.mark.parametrize(
    "sampling, message",
    [
        (SamplingConfig(method="heun"), "is for flows"),
        (SamplingConfig(steps=51), "51, but the model has 50 levels"),
        (SamplingConfig(anneal={"z": 1.0}), "anneal names 'z'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sampling, message):
    fields = {"x": Field(GaussianDiffusion(2, 50), False)}
    with pytest.raises(ValueError, match=message):
        sample(lambda f, u: f, fields, packing(2), sampling)
    with pytest.raises(ValueError, match=r"unknown sampling\.method 'hein'.*heun"):
        SamplingConfig(method="hein")
