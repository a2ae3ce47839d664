"""Linear layers that make their input anew: the same values and gradients from less memory."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crysforge.models.ops.recompute import linear_of


def product(x, y):
    return F.gelu(x) * y.sin()


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 4, generator=generator, dtype=dtype, requires_grad=True) for _ in "xy")
    torch.manual_seed(0)
    return nn.Linear(4, 3, dtype=dtype), x, y


def test_gradients_are_those_of_differences():
    layer, x, y = case()

    def function(x, y, weight, bias):
        return linear_of(product, SimpleNamespace(weight=weight, bias=bias), x, y)

    assert torch.autograd.gradcheck(function, (x, y, layer.weight, layer.bias))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_the_plain_layer(precision):
    results = []
    for apply in (linear_of, lambda f, layer, *inputs: layer(f(*inputs))):
        layer, x, y = case(torch.float32)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = apply(product, layer, x, y)
        out.float().square().sum().backward()
        results.append([out, x.grad, y.grad, layer.weight.grad, layer.bias.grad])
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", ["x", "y", "both"])
def test_inputs_without_a_gradient(frozen):
    layer, x, y = case()
    x.requires_grad_(frozen == "y")
    y.requires_grad_(frozen == "x")
    linear_of(product, layer, x, y).sum().backward()
    plain, *_ = case()
    plain(product(x, y)).sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert [v.grad is None for v in (x, y)] == [frozen in ("x", "both"), frozen in ("y", "both")]


def test_only_the_inputs_are_kept():
    layer, x, y = case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        linear_of(product, layer, x, y)
    assert set(kept) == {t.data_ptr() for t in (layer.weight, x, y)}
