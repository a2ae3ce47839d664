"""CSPNet in its fast form is its plain definition, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from crysforge.models.denoisers.cspnet import CSPLayers
from crysforge.models.denoisers.pair_layout import PairLayout

SIZES = {"mixed": [3, 1, 5, 3, 2], "sorted": [1, 4, 4], "single": [1, 1]}


def plain(net: CSPLayers, x, frac, lattice, batch):
    """All ordered pairs, every feature of a message side by side, as the paper has it."""
    i, j = torch.nonzero(batch[:, None] == batch[None], as_tuple=True)
    m = 2 * math.pi * torch.arange(net.frequencies)
    angle = ((frac[j] - frac[i])[:, :, None] * m).flatten(1)
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    degree = torch.bincount(i)[:, None]
    for layer in net.layers:
        h = layer.norm(x)
        message = layer.message(torch.cat([h[i], lattice[batch[i]], h[j], waves], dim=1))
        message = F.silu(layer.message_out(F.silu(message)))
        mean = torch.zeros_like(h).index_add(0, i, message) / degree
        x = x + layer.update(torch.cat([h, mean], dim=1))
    return net.norm(x)


@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_fast_form_is_the_definition(sizes, recompute):
    torch.manual_seed(0)
    net = CSPLayers(width=12, layers=3, frequencies=5, state=9).double()
    net.recompute = recompute
    atoms, each = sum(sizes), torch.tensor(sizes)
    batch = torch.repeat_interleave(torch.arange(len(sizes)), each)
    ptr = F.pad(each.cumsum(0), (1, 0))
    given = [torch.randn(atoms, 12), torch.rand(atoms, 3) * 4 - 2, torch.randn(len(sizes), 9)]
    weight = torch.randn(atoms, 12).double()
    found = []
    for fast in (True, False):
        x, frac, lattice = (v.double().requires_grad_() for v in given)
        if fast:
            layout = PairLayout.of(batch, ptr, sizes)
            sort = layout.sort_atoms
            out = net.propagate(sort(x), sort(frac), layout.sort_crystals(lattice), layout)
            out = layout.unsort_atoms(out)
        else:
            out = plain(net, x, frac, lattice, batch)
        wanted = [x, frac, lattice, *net.parameters()]
        found.append([out, *torch.autograd.grad((out * weight).sum(), wanted)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_layout_without_sizes_is_the_same():
    sizes = [3, 1, 2]
    ptr = torch.tensor([0, 3, 4, 6])
    batch = torch.tensor([0, 0, 0, 1, 2, 2])
    one, other = PairLayout.of(batch, ptr), PairLayout.of(batch, ptr, sizes)
    assert one.runs == other.runs == ((1, 1), (2, 1), (3, 1)) and one.pairs == 14
    places = torch.cat([one.forward, one.backward, one.own])
    assert torch.equal(places.sort().values, torch.arange(14))
    assert torch.equal(other.unsort_atoms(other.sort_atoms(batch)), batch)
