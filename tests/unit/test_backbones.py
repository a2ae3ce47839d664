"""Each backbone is what its definition says, has the published number of parameters, and finds the
geometry it needs in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from datapipe.graph import build
from models.encoders import ENCODERS, build_encoder
from tests.reference_backbones import PLAIN
from tests.unit.test_encoders import TRAINING, close, crystals, doubled, tiny

OWN = sorted(set(ENCODERS) - {"pddformer", "matformer"})
"""The encoders of this file; the two others have their definitions in test_encoders."""


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


@TRAINING
@pytest.mark.parametrize("name", OWN)
def test_latents_and_gradients_are_those_of_the_definition(name, training):
    encoder = tiny(name, training).double()
    full, fewest = (doubled(build(crystals(), encoder.graph, quotient=q)) for q in (False, True))
    assert (fewest.num_nodes < full.num_nodes) == (encoder.graph.depth is not None)
    weight = torch.randn(full.num_atoms, encoder.dim, dtype=torch.float64)
    results = []
    for run, batch in ((encoder, fewest), (lambda b: PLAIN[name](encoder, b), full)):
        encoder.zero_grad()
        latents = run(batch)
        (latents * weight).sum().backward()
        results.append((latents.detach(), [p.grad.clone() for p in encoder.parameters()]))
    (latents, gradients), (plain, expected) = results
    close(latents, plain, 1e-10)
    largest = max(float(g.abs().max()) for g in expected)
    for (key, _), a, b in zip(encoder.named_parameters(), gradients, expected, strict=True):
        close(a / largest, b / largest, 1e-10, key)


# Parameters


def test_cgcnn_parameters():
    encoder = build_encoder({"name": "cgcnn", "node_inputs": 92})
    assert [count(c) for c in encoder.convs] == [22_144] * 3
    assert count(encoder, nn.Linear(64, 128), nn.Linear(128, 1)) == 80_833


def test_schnet_parameters():
    from torch_geometric.nn import SchNet

    theirs = SchNet()
    ours = build_encoder({"name": "schnet"})
    assert count(ours.interactions) == count(theirs.interactions)
