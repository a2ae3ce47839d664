"""Layers turn their results as their inputs are turned; coefficients are those of the algebra."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from crysforge.models.layers import tensor_product
from crysforge.models.layers.irreps import (
    IrrepLinear,
    IrrepNorm,
    coupling,
    flatten,
    gate,
    gated_channels,
    rotation_matrix,
    unflatten,
    unit_moment,
)
from crysforge.models.layers.spherical import spherical_harmonics
from crysforge.models.layers.tensor_product import Couplings, SeparableProduct

CHANNELS = (6, 5, 4)


def rotation(seed: int) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.linalg.det(q)


def features(rows: int, seed: int = 0, channels=CHANNELS) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(rows, 2 * l + 1, c).double() for l, c in enumerate(channels)]


def turned(x, turn: np.ndarray):
    matrices = (torch.from_numpy(rotation_matrix(l, turn)) for l in range(len(x)))
    return [matrix @ part for matrix, part in zip(matrices, x, strict=True)]


def same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("degree", range(4))
def test_rotations_of_harmonics_are_orthogonal_and_follow_one_another(degree):
    first, second = rotation(1), rotation(2)
    a, b = (rotation_matrix(degree, r) for r in (first, second))
    assert np.allclose(a @ a.T, np.eye(2 * degree + 1), atol=1e-12)
    assert np.allclose(rotation_matrix(degree, first @ second), a @ b, atol=1e-12)
    r = np.random.default_rng(0).normal(size=(5, 3))
    r /= np.linalg.norm(r, axis=1, keepdims=True)
    y, turned_y = (
        spherical_harmonics(torch.from_numpy(x), degree + 1)[:, degree**2 :].numpy()
        for x in (r, r @ first.T)
    )
    assert np.allclose(y @ a.T, turned_y, atol=1e-12)


@pytest.mark.parametrize("degrees", itertools.product(range(3), repeat=3), ids=str)
def test_couplings_turn_products(degrees):
    a, b, c = degrees
    if not abs(a - b) <= c <= a + b:
        with pytest.raises(ValueError, match="do not couple"):
            coupling(a, b, c)
        return
    tensor = coupling(a, b, c)
    x, y = (np.random.default_rng(l).normal(size=2 * l + 1) for l in (a, b))
    d = [rotation_matrix(l, rotation(3)) for l in degrees]
    plain = np.einsum("abc,a,b->c", tensor, x, y)
    assert np.allclose(np.einsum("abc,a,b->c", tensor, d[0] @ x, d[1] @ y), d[2] @ plain)
    assert np.sum(tensor**2) == pytest.approx(1)
    # To orthonormal sums: each component of the result takes an equal share.
    shares = np.einsum("abc,abd->cd", tensor, tensor)
    assert np.allclose(shares, np.eye(2 * c + 1) / (2 * c + 1))


def test_couplings_of_vectors_are_their_products():
    """In the basis of the harmonics of degree 1, which are the components of a unit vector."""
    axes = spherical_harmonics(torch.eye(3, dtype=torch.float64), 2)[:, 1:].numpy()
    a, b = np.random.default_rng(0).normal(size=(2, 3))
    scalar = np.einsum("abc,a,b->c", coupling(1, 1, 0), a @ axes, b @ axes)
    assert scalar == pytest.approx(a @ b / math.sqrt(3))
    vector = np.einsum("abc,a,b->c", coupling(1, 1, 1), a @ axes, b @ axes)
    expected = np.cross(a, b) @ axes / math.sqrt(6)
    assert np.allclose(vector, expected) or np.allclose(vector, -expected)


def test_layers_are_equivariant():
    torch.manual_seed(0)
    linear = IrrepLinear(CHANNELS, (3, 2, 7)).double()
    norm = IrrepNorm(CHANNELS).double()
    gates = IrrepLinear(CHANNELS, gated_channels(CHANNELS)).double()
    x, turn = features(4), rotation(0)
    for layer in (linear, norm, lambda z: gate(gates(z))):
        same(layer(turned(x, turn)), turned(layer(x), turn))


@pytest.mark.parametrize("outputs", [(3, 2, 4), (3, 2), (3,)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_products_with_harmonics_are_equivariant(outputs, shared):
    torch.manual_seed(0)
    layer = SeparableProduct(CHANNELS, outputs).double()
    couplings = Couplings(len(CHANNELS))
    r = F.normalize(torch.randn(7, 3).double(), dim=1)
    weight = torch.randn(*(() if shared else (7,)), layer.numel).double()
    x, turn = features(7), rotation(0)

    def run(x, r):
        return layer(x, couplings(spherical_harmonics(r, len(CHANNELS))), weight)

    other = run(turned(x, turn), r @ torch.from_numpy(turn).T)
    same(other, turned(run(x, r), turn))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("outputs", [(2, 2, 1), (2,)], ids=str)
def test_gradients_of_products_with_harmonics(outputs, shared, monkeypatch):
    monkeypatch.setattr(tensor_product, "BLOCK", 2)
    torch.manual_seed(0)
    layer = SeparableProduct((2, 1, 1), outputs).double()
    matrices = Couplings(3)(spherical_harmonics(F.normalize(torch.randn(5, 3).double(), dim=1), 3))
    weight = torch.randn(*(() if shared else (5,)), layer.numel).double()
    inputs = [*features(5, channels=(2, 1, 1)), weight, *layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def run(a, b, c, weight, *parameters):
        args = [a, b, c], matrices, weight
        return tuple(functional_call(layer, dict(zip(names, parameters, strict=True)), args))

    assert torch.autograd.gradcheck(run, [t.detach().requires_grad_() for t in inputs])


def test_products_of_unit_features_have_unit_components():
    """So that no layer has to grow or shrink at the start."""
    x = features(4_000, channels=(2, 2, 2))
    r = F.normalize(torch.randn(4_000, 3).double(), dim=1)
    layer = SeparableProduct((2, 2, 2), (64, 64, 64)).double()
    weight = torch.randn(4_000, layer.numel).double()
    for part in layer(x, Couplings(3)(spherical_harmonics(r, 3)), weight):
        assert float(part.detach().var()) == pytest.approx(1, abs=0.3)


def test_the_norm_does_not_blow_up_what_vanishes():
    x = features(4)
    x[1], x[2] = 1e-7 * x[1], 0 * x[2]
    out = [part.detach() for part in IrrepNorm(CHANNELS).double()(x)]
    assert float(out[1].abs().max()) < 1e-6
    assert not out[2].any()


def test_flatten_and_back():
    x = features(3)
    same(unflatten(flatten(x), CHANNELS), x)


def test_unit_moments():
    torch.manual_seed(0)
    z = torch.randn(1_000_000)
    for f in (F.silu, torch.sigmoid, torch.tanh):
        assert float((unit_moment(f) * f(z)).square().mean()) == pytest.approx(1, abs=0.01)
