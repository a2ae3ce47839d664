"""ALIGNN, DimeNet++ and MEGNet are what their definitions say and have the published number of
parameters; sums over angles equal those over all pairs of edges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import eval_legendre, spherical_jn
from torch import nn
from torch_geometric.nn.models.dimenet import SphericalBasisLayer

from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.schema import GraphSpec
from crysforge.models.encoders import build_encoder
from crysforge.models.layers.angle_sums import Turns, reverse_edges
from crysforge.models.layers.spherical import SphericalBessel, spherical_harmonics
from crysforge.models.ops.edges import Edges
from crysforge.trainer.engines.base import EngineConfig
from crysforge.trainer.loop.memory import activation_bytes
from crysforge.trainer.stages.vae import VAEConfig, VAEStage
from tests.models.encoders.test_encoders import close, crystal, crystals, doubled, tiny
from tests.reference_angles import PLAIN, followers


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


# Parameters


def test_alignn_parameters():
    encoder = build_encoder({"name": "alignn", "node_inputs": 92})
    unused = 2 * count(nn.BatchNorm1d(256))  # norms of the last bonds and angles
    assert count(encoder.on_atoms[0]) == 329_984
    assert count(encoder, nn.Linear(256, 1)) + unused == 4_026_753


def test_dimenet_parameters():
    from torch_geometric.nn import DimeNetPlusPlus

    settings = {"hidden_channels": 128, "int_emb_size": 64, "basis_emb_size": 8}
    sizes = {"out_emb_channels": 256, "num_spherical": 2, "num_radial": 2, "num_blocks": 4}
    theirs = DimeNetPlusPlus(out_channels=128, **settings, **sizes)
    ours = build_encoder({"name": "dimenet++", "degrees": 2, "roots": 2, "node_inputs": 95})
    assert count(ours.interactions) == count(theirs.interaction_blocks)
    assert count(ours.outputs) == count(theirs.output_blocks)
    assert count(ours) == count(theirs) + 128  # a bias on the elements


def test_megnet_parameters():
    encoder = build_encoder({"name": "megnet", "node_inputs": 95})
    assert count(encoder.blocks[0]) == 39_392
    two_zeros = count(nn.Linear(2, 64), nn.Linear(64, 32))
    set2sets = 2 * (count(nn.Linear(32, 16)) + count(nn.Linear(32, 64)))
    readout = count(nn.Linear(96, 32), nn.Linear(32, 16), nn.Linear(16, 1))
    ours = count(encoder) - count(encoder.embed_element) + 95 * 16 - len(encoder.state)
    assert ours + two_zeros + set2sets + readout == 167_761


# Angles


def pairs(graph):
    """An irregular crystal's edges and vectors in double precision, and all pairs that turn."""
    batch = doubled(build([crystal("irregular"), crystal("copper")], graph))
    edges, vectors = Edges.of(batch), batch.edge_vector
    first, second = followers(batch)
    turning = (vectors[first] + vectors[second]).norm(dim=1) > 1e-3
    return edges, vectors, first[turning], second[turning]


def test_turns_are_sums_over_pairs_of_edges():
    degrees, graph = 7, GraphSpec(radius=4.0, vectors=True)
    edges, vectors, first, second = pairs(graph)
    assert len(first) > 5 * len(edges)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosine = (unit[first] * unit[second]).sum(1).clamp(-1, 1)
    legendre = torch.stack(
        [torch.from_numpy(eval_legendre(l, cosine.numpy())) for l in range(degrees)], dim=1
    )
    x, weight = (torch.randn(len(edges), k, 5, dtype=torch.float64) for k in (degrees, 1))
    x.requires_grad_()
    expected = torch.zeros(len(edges), 5, dtype=torch.float64)
    expected = expected.index_add(0, second, (x[first] * legendre[..., None]).sum(1))
    result = Turns.of(edges, vectors, degrees)(x)
    close(result, expected, 1e-12)
    gradients = (torch.autograd.grad((y * weight[:, 0]).sum(), x)[0] for y in (result, expected))
    close(*gradients, 1e-12)


def test_reversed_edges_swap_ends_and_vector():
    batch = build(crystals(), GraphSpec(radius=4.0, vectors=True))
    edges = Edges.of(batch)
    reverse = reverse_edges(edges, batch.edge_vector)
    assert torch.equal(edges.source[reverse], edges.target)
    assert torch.equal(edges.target[reverse], edges.source)
    close(batch.edge_vector[reverse], -batch.edge_vector, 1e-6)
    assert torch.equal(reverse[reverse], torch.arange(len(edges)))


def test_spherical_harmonics_add_up_to_legendre_polynomials():
    unit = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=1)
    unit = torch.cat([unit, torch.eye(3, dtype=torch.float64)])
    y, cosine = spherical_harmonics(unit, 7), (unit @ unit.t()).numpy()
    for l in range(7):
        block = y[:, l**2 : (l + 1) ** 2]
        close(block @ block.t(), torch.from_numpy(eval_legendre(l, cosine)), 1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_bessel_waves_are_scipys_and_orthonormal(dtype, tolerance):
    waves = SphericalBessel(7, 6)
    points, weights = np.polynomial.legendre.leggauss(200)
    x = (points + 1) / 2
    values = waves(torch.from_numpy(x).to(dtype))
    assert values.dtype == dtype
    wanted = spherical_jn(np.arange(7)[:, None], waves.zeros.numpy() * x[:, None, None])
    wanted = torch.from_numpy(wanted) * waves.scale
    near = torch.from_numpy(x) > 0.03  # 0.15 Å, the shortest edge
    close(values[near].double(), wanted[near], tolerance)
    products = torch.einsum("rln,rlm,r->lnm", wanted, wanted, torch.from_numpy(weights / 2 * x**2))
    close(products, torch.eye(6, dtype=torch.float64).expand(7, 6, 6), 1e-9)


def test_spherical_basis_is_pygs():
    encoder = build_encoder({"name": "dimenet++", "tiny": True, "degrees": 2, "roots": 2})
    distance, angle = torch.linspace(1.0, 3.9, 9), torch.linspace(0.1, 3, 9)
    theirs = SphericalBasisLayer(2, 2, cutoff=4.0)(distance, angle, torch.arange(9))
    legendre = torch.stack([torch.ones(9), angle.cos()], dim=1)
    ours = torch.einsum("rlk,rl->rk", encoder._waves_by_degree(distance), legendre)
    close(ours, theirs, 1e-5)


def test_alignn_counts_the_bonds_of_an_atom_with_its_own_images_twice():
    encoder = tiny("alignn")
    batch = build([crystal("copper")], encoder.graph)
    assert batch.num_edges == 24
    assert (batch.edge_vector[:, None] - batch.edge_vector).norm(dim=2).lt(1e-5).sum() == 48


def test_megnet_reads_the_state_out_like_a_property_of_the_crystal():
    """The last third of a latent is the same for all atoms of a crystal, and other crystals have
    others."""
    encoder = tiny("megnet")
    batch = build(crystals(), encoder.graph)
    state = encoder(batch)[:, -encoder.dim // 3 :]
    for c in range(batch.num_crystals):
        own = state[batch.batch == c]
        close(own, own[:1].expand_as(own), 1e-6)
    first = state[batch.ptr[:-1]]
    assert torch.pdist(first).min() > 1e-3


@pytest.mark.parametrize("name", ["alignn", "dimenet++"])
def test_angles_are_seen(name):
    """Edges of equal lengths that meet at other angles give other latents; turned together, not."""
    encoder = tiny(name, training=True)
    batch = build([crystal("irregular")], encoder.graph)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    bend = torch.diag(torch.tensor([1.0, 1.0, 2.0]))
    ours, turned, bent = (
        encoder(dataclasses.replace(batch, edge_vector=batch.edge_vector @ matrix))
        for matrix in (torch.eye(3), rotation, bend)
    )
    assert (bent - ours).abs().max() > 30 * (turned - ours).abs().max() + 1e-4


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_memory_of_a_step_is_known_from_shapes(name):
    """Also where the number of angles is no shape of the batch."""
    encoder = tiny(name)
    stage = VAEStage(VAEConfig(), encoder)
    small, large = (
        activation_bytes(stage, build(crystals() * times, encoder.graph), EngineConfig())
        for times in (1, 3)
    )
    assert 2 * small < large < 4 * small
