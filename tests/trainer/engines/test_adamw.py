"""The fused update with clipping and guard is plain AdamW behind plain clipping, to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crysforge.trainer.engines.adamw import (
    GuardedAdamW,
    has_fused_adamw,
    load_state,
    state_of,
)

CPU = torch.device("cpu")
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "fallback"])


class Weights(nn.Module):
    """Sizes that no vector register divides, one weight that is laid out by columns, one that
    never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        shapes = {"a": (33, 7), "b": (1001,), "c": (70, 301), "one": (1,), "unused": (3,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=draws)))
        self.columns = nn.Parameter(torch.randn(5, 9, generator=draws).t())

    def groups(self) -> list[dict]:
        vectors = [self.b, self.one, self.unused]
        return [
            {"params": [self.a, self.c, self.columns], "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ]

    def gradients(self, step: int) -> None:
        """Draws the gradients of a step; they fade, so that some are clipped and some are not."""
        draws = torch.Generator().manual_seed(100 + step)
        for name, p in self.named_parameters():
            if name != "unused":
                p.grad = torch.randn(p.shape, generator=draws) / 2**step


def train(steps, fused, clip=1.0, weights=None, optimizer=None, spoilt=()):
    weights = weights or Weights()
    optimizer = optimizer or GuardedAdamW(weights.groups(), clip, CPU, fused)
    for step in steps:
        weights.gradients(step)
        if step in spoilt:
            weights.c.grad[5, 7] = torch.nan if step % 2 else torch.inf
        optimizer.step()
        assert bool(optimizer.skipped) == (step in spoilt)
    return weights, optimizer


def flat(weights: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in weights.parameters()])


@FUSED
@pytest.mark.parametrize("clip", [0.0, 1.0, 1e9])
def test_it_is_torchs_plain_adamw_after_plain_clipping(fused, clip):
    ours, optimizer = train(range(12), fused, clip)
    theirs = Weights()
    plain = torch.optim.AdamW(
        theirs.groups(), lr=1e-3, betas=(0.95, 0.999), foreach=False, fused=False
    )
    for step in range(12):
        theirs.gradients(step)
        limit = clip or float("inf")
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), limit, foreach=False)
        plain.step()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    kept, expected = state_of(ours, optimizer), state_of(theirs, plain)
    assert kept.keys() == expected.keys() and "exp_avg/unused" not in kept
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-8, msg=name)


@FUSED
def test_a_gradient_that_is_not_finite_leaves_no_trace(fused):
    """Nor does it in the steps that come after."""
    spoilt, optimizer = train([0], fused, spoilt=[0])
    assert torch.equal(flat(spoilt), flat(Weights())) and state_of(spoilt, optimizer) == {}
    train(range(1, 6), fused, weights=spoilt, optimizer=optimizer, spoilt=[3])
    clean, twin = train([1, 2, 4, 5], fused)
    assert torch.equal(flat(spoilt), flat(clean))
    ours, theirs = state_of(spoilt, optimizer), state_of(clean, twin)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@FUSED
@pytest.mark.parametrize("then", [True, False], ids=["then fused", "then fallback"])
def test_a_state_that_is_taken_up_again_goes_on_as_before(fused, then):
    whole, _ = train(range(8), fused)
    half, optimizer = train(range(4), fused)
    state = {k: v.contiguous() for k, v in state_of(half, optimizer).items()}  # as files hold it
    again = GuardedAdamW(half.groups(), 1.0, CPU, then)
    load_state(half, again, state)
    train(range(4, 8), then, weights=half, optimizer=again)
    if then == fused:
        assert torch.equal(flat(half), flat(whole))
    torch.testing.assert_close(flat(half), flat(whole), rtol=1e-6, atol=1e-6)


def test_torch_builds_without_the_kernel_do_without():
    assert has_fused_adamw(CPU)
    assert not has_fused_adamw(torch.device("meta"))
    optimizer = GuardedAdamW(Weights().groups(), 1.0, torch.device("meta"))
    assert not optimizer.defaults["fused"]
