"""Each backbone is what its definition says, has the published number of parameters, and finds the
geometry it needs in the batch."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.lattice_vectors import signed_triple
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.schema import GraphSpec, concat
from crysforge.models.encoders import ENCODERS, build_encoder
from crysforge.models.layers.readout import ReadoutHead
from crysforge.trainer.base.command_line import from_sources
from crysforge.trainer.jobs.schemas import FinetuneJob
from tests import reference_angles
from tests.models.encoders.test_encoders import (
    TRAINING,
    close,
    crystal,
    crystals,
    doubled,
    tiny,
)
from tests.reference_backbones import PLAIN
from tests.reference_encoders import REFERENCES

CONFIGS = Path(__file__).parents[3] / "configs" / "finetune"


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


DEFINITIONS = PLAIN | reference_angles.PLAIN


@TRAINING
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_latents_and_gradients_are_those_of_the_definition(name, training):
    encoder = tiny(name, training).double()
    full, fewest = (doubled(build(crystals(), encoder.graph, quotient=q)) for q in (False, True))
    assert (fewest.num_nodes < full.num_nodes) == (encoder.graph.depth is not None)
    weight = torch.randn(full.num_atoms, encoder.dim, dtype=torch.float64)
    results = []
    for run, batch in ((encoder, fewest), (lambda b: DEFINITIONS[name](encoder, b), full)):
        encoder.zero_grad()
        latents = run(batch)
        (latents * weight).sum().backward()
        results.append((latents.detach(), [p.grad.clone() for p in encoder.parameters()]))
    (latents, gradients), (plain, expected) = results
    tolerance = 1e-8 if name in reference_angles.PLAIN else 1e-10  # angles cost digits
    close(latents, plain, tolerance)
    largest = max(float(g.abs().max()) for g in expected)
    for (key, _), a, b in zip(encoder.named_parameters(), gradients, expected, strict=True):
        close(a / largest, b / largest, tolerance, key)


def test_every_encoder_has_a_definition_that_it_is_held_to():
    """But for cspnet, whose layers are held to theirs in tests/models/denoisers/test_cspnet.py."""
    assert set(ENCODERS) == {*DEFINITIONS, *REFERENCES, "cspnet"}


# Parameters


def test_cgcnn_parameters():
    encoder = build_encoder({"name": "cgcnn", "node_inputs": 92})
    assert [count(c) for c in encoder.convs] == [22_144] * 3
    assert count(encoder, nn.Linear(64, 128), nn.Linear(128, 1)) == 80_833


def test_cogn_parameters():
    encoder = build_encoder({"name": "cogn"})
    assert [count(c) for c in encoder.convs] == [131_840] * 5
    assert count(encoder) == 119 * 128 + 128 + 32 * 128 + 128 + 5 * 131_840 == 678_784


def test_gatgnn_parameters():
    """What the released network uses of its own, which counts 92 element features in and 103 for
    the composition, a rectifier that nothing goes through in each layer, and the bias of a score
    that the softmax takes away."""
    encoder = build_encoder({"name": "gatgnn", "node_inputs": 92})
    assert [count(c) for c in encoder.convs] == [128 * 256 + 4 * 128 + 64 + 8] * 3
    behind = count(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 1))
    total = count(encoder) + (103 - 92) * 32 + 1 + behind
    assert total == 5_952 + 2_688 + 3 * (33_352 + 128) + 5_409 + behind == 122_874
    assert count(build_encoder({"name": "gatgnn"})) == 116_728


def test_schnet_parameters():
    from torch_geometric.nn import SchNet

    theirs = SchNet()
    ours = build_encoder({"name": "schnet"})
    assert count(ours.interactions) == count(theirs.interactions)


def test_icomformer_parameters():
    encoder = build_encoder({"name": "icomformer", "node_inputs": 92})
    assert count(encoder.update_edges) == 1_249_792
    assert count(encoder, ReadoutHead(256)) == 4_892_417


def test_ecomformer_parameters():
    encoder = build_encoder({"name": "ecomformer", "node_inputs": 92})
    assert count(encoder.update) == 2_862_272
    assert count(encoder, ReadoutHead(256)) == 5_583_809


def test_equiformer_parameters():
    """3,531,715 are published, for the 5 elements of QM9; some reach no output."""
    encoder = build_encoder({"name": "equiformer", "node_inputs": 5})
    in_last_layer = 96 + 288 * 129 + 64 * 192 + 32 * 96 + 64**2 + 32**2 + 736 + 384 * 64 + 352 * 32
    in_embedding = 128 + 576 * 65 + 96 * 128 + 256 * 64 + 224 * 32
    total = count(encoder, nn.Linear(512, 512), nn.Linear(512, 1))
    assert total + in_last_layer + in_embedding == 3_531_715


def test_potnet_parameters():
    encoder = build_encoder({"name": "potnet", "node_inputs": 92})
    assert [count(c) for c in encoder.convs] == [526_336] * 3
    assert count(encoder, ReadoutHead(256)) == 1_751_809


# Configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_finetuning_configs_name_an_encoder_and_settings_that_exist(path):
    job = from_sources(FinetuneJob, [str(path)], [])
    encoder = build_encoder(job.encoder)
    if path.stem in ENCODERS:
        assert encoder.section == build_encoder({"name": path.stem}).section


# The lattice triple


def random_lattice(seed: int) -> np.ndarray:
    return 4 * np.eye(3) + np.random.default_rng(seed).uniform(-1.5, 1.5, size=(3, 3))


BASES = (np.eye(3), [[1, 0, 0], [1, 1, 0], [0, -1, 1]], [[0, 1, 0], [0, 2, 1], [1, 0, -3]])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("basis", BASES, ids=["given", "skewed", "long"])
def test_the_lattice_triple_is_the_shortest_of_its_rule_in_any_basis(seed, basis):
    lattice = random_lattice(seed)
    triple = signed_triple(np.array(basis) @ lattice)
    images = [i for i in itertools.product(range(-3, 4), repeat=3) if any(i)]
    images.sort(key=lambda i: np.linalg.norm(i @ lattice))
    first = images[0]
    second = next(i for i in images if np.cross(first, i).any())
    third = next(i for i in images if np.linalg.det([first, second, i]).round())
    for got, image in zip(triple, (first, second, third), strict=True):
        expected = image @ lattice
        assert np.allclose(got, expected) or np.allclose(got, -expected)
    assert triple[0] @ triple[1] >= 0
    assert triple[0] @ triple[2] >= 0
    assert np.linalg.det(triple) > 0


def test_crystals_carry_their_lattice_triple():
    spec = GraphSpec(neighbors=4, lattice_triple=True)
    batch = concat([build(crystals()[:3], spec), build(crystals()[3:], spec)])
    expected = [signed_triple(c.lattice) for c in crystals()]
    close(batch.lattice_triple, torch.tensor(np.stack(expected), dtype=torch.float32), 1e-6)
    assert build(crystals(), GraphSpec(neighbors=4)).lattice_triple is None


def test_icomformer_tells_a_crystal_from_its_mirror_image():
    encoder, c = tiny("icomformer").double(), crystal("irregular")
    turned, mirrored = (
        Crystal.create("m", c.numbers, c.frac_coords, c.lattice * [1, sign, -1]) for sign in (-1, 1)
    )
    ours, same, other = (encoder(doubled(build([x], encoder.graph))) for x in (c, turned, mirrored))
    assert (other - ours).abs().max() > 10 * (same - ours).abs().max() + 1e-5


def test_ecomformer_does_not_tell_a_crystal_from_its_mirror_image():
    encoder, c = tiny("ecomformer").double(), crystal("irregular")
    mirrored = Crystal.create("m", c.numbers, c.frac_coords, c.lattice * [1, 1, -1])
    ours, other = (encoder(doubled(build([x], encoder.graph))) for x in (c, mirrored))
    close(other, ours, 1e-5)


def test_ecomformer_sees_directions():
    """Of two graphs with equal distances, in which a neighbour is elsewhere."""
    encoder = tiny("ecomformer").double()
    batch = doubled(build([crystal("irregular")], encoder.graph))
    vectors = batch.edge_vector.clone()
    vectors[0] = vectors[0].roll(1)
    bent = dataclasses.replace(batch, edge_vector=vectors)
    assert not torch.allclose(encoder(bent), encoder(batch), atol=1e-6)
