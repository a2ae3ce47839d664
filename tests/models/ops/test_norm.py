"""Weighted batch norm equals `nn.BatchNorm1d` on repeated rows."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from crysforge.models.ops.norm import (
    BatchNorm,
    Moments,
    merge,
    merge_over_ranks,
    moments,
    uncounted,
)


def rows(n=7, dim=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, dtype=torch.float64, generator=g) * 3 + 5
    count = torch.randint(1, 5, (n,), generator=g)
    return x.requires_grad_(), count


def pair(dim=5, training=True):
    """Ours and PyTorch's with the same random state."""
    ours, theirs = BatchNorm(dim).double(), nn.BatchNorm1d(dim).double()
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2)
        ours.bias.normal_()
        ours.running_mean.normal_()
        ours.running_var.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    return ours.train(training), theirs.train(training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("counted", [True, False])
def test_equals_batchnorm1d_on_repeated_rows(training, counted):
    ours, theirs = pair(training=training)
    x, count = rows()
    repeats = count if counted else torch.ones_like(count)
    again = x.detach().clone().requires_grad_()
    for scale in (1.0, -0.3):  # two uses in one graph: both backward passes see their own batch
        y = ours(x * scale, count.float() if counted else None)
        y_ref = theirs((again * scale).repeat_interleave(repeats, 0))
        torch.testing.assert_close(y.repeat_interleave(repeats, 0), y_ref)
        upstream = torch.randn_like(y_ref)
        # A row's gradient is the sum over the rows that it stands for.
        summed = torch.zeros_like(y).index_add(
            0, torch.arange(len(x)).repeat_interleave(repeats), upstream
        )
        y.backward(summed)
        y_ref.backward(upstream)
    torch.testing.assert_close(x.grad, again.grad)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


def test_two_uses_before_one_backward():
    ours, theirs = pair()
    x, _ = rows()
    other = x.detach().clone().requires_grad_()
    (ours(ours(x) * x)).pow(3).sum().backward()
    (theirs(theirs(other) * other)).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_gradients_are_those_of_finite_differences():
    ours, _ = pair()
    x, count = rows(4, 3)
    ours = BatchNorm(3).double()
    assert torch.autograd.gradcheck(lambda x: ours(x, count.double()), x)


def test_moments_of_parts_are_moments_of_the_whole():
    x, count = rows(12)
    x, weight = x.detach() + 1e6, count.double()
    cuts = [slice(0, 1), slice(1, 1), slice(1, 8), slice(8, 12)]  # one of them empty
    merged = merge([moments(x[c], weight[c]) for c in cuts])
    repeated = x.repeat_interleave(count, 0)
    assert merged.total == count.sum()
    torch.testing.assert_close(merged.mean, repeated.mean(0))
    torch.testing.assert_close(merged.m2 / merged.total, repeated.var(0, unbiased=False))


def test_no_rows_at_all():
    norm = BatchNorm(3)
    before = norm.running_var.clone()
    out = norm(torch.zeros(0, 3, requires_grad=True), torch.zeros(0))
    out.sum().backward()
    assert out.shape == (0, 3)
    assert torch.equal(norm.running_var, before)
    assert torch.equal(norm.weight.grad, torch.zeros(3))


def test_one_row_in_training_is_an_error_but_four_equal_ones_are_not():
    norm = BatchNorm(3)
    x = torch.randn(1, 3)
    with pytest.raises(ValueError, match="more than one row"):
        norm(x)
    torch.testing.assert_close(norm(x, torch.tensor([4.0])), torch.zeros(1, 3))
    norm.eval()(x)


def test_statistics_stay_fp32_under_autocast():
    x = torch.randn(4096, 2) + 100  # the mean of bf16 sums would be off by more than 0.1
    norm = BatchNorm(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, x.bfloat16().float().mean(0) * 0.1)


def test_empty_part_has_no_moments():
    part = moments(torch.zeros(0, 2), torch.zeros(0))
    assert isinstance(part, Moments)
    assert part.total == 0 and not part.mean.any() and not part.m2.any()


@pytest.mark.parametrize("n", [0, 1, 7])
def test_rows_that_do_not_count_are_seen_by_no_statistics(n):
    ours, _ = pair()
    before = {k: v.clone() for k, v in ours.state_dict().items() if k.startswith("running")}
    x = rows()[0].detach()[:n].requires_grad_()
    with uncounted(nn.Sequential(ours)):
        y = ours(x)
    y.sum().backward()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in before.items())
    slope = ours.weight / (ours.running_var + ours.eps).sqrt()
    torch.testing.assert_close(x.grad, slope.expand_as(x))
    torch.testing.assert_close(y, ours.eval()(x))
    ours.train()(rows()[0])
    assert not torch.equal(ours.running_mean, before["running_mean"])  # counted again


class Calls(TorchDispatchMode):
    """Counts the operations that reach a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_more_ranks_are_no_more_operations():
    counts = []
    for ranks in (2, 512):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        try:
            local = moments(torch.randn(6, 3), torch.ones(6))
            with Calls() as calls:
                merge_over_ranks(local)
        finally:
            dist.destroy_process_group()
        counts.append(calls.count)
    assert 0 < counts[0] == counts[1]
