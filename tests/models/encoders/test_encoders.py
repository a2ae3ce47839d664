"""What every registered encoder promises, and that the fast ones equal their definitions."""

from __future__ import annotations

import dataclasses
import runpy
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch

import crysforge.models.registry
from crysforge.datapipe.common.config import configure
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import Sample
from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.encoders import ENCODERS, Encoder, build_encoder
from crysforge.models.layers.readout import ReadoutHead
from tests.reference_encoders import REFERENCES, reference

EVERY = pytest.mark.parametrize("name", list(ENCODERS))
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def tiny(name: str, training: bool = False, **settings) -> Encoder:
    """The debug flavour with random running statistics, so that eval mode has something to do."""
    torch.manual_seed(0)
    encoder = build_encoder({"name": name, "tiny": True, **settings})
    with torch.no_grad():
        for key, buffer in encoder.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_()
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return encoder.train(training)


def crystal(name: str) -> Crystal:
    """Symmetric and irregular crystals, one of them with a single atom."""
    rng = np.random.default_rng(len(name))
    if name == "rocksalt":
        half = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
        frac = np.concatenate([half, half + np.array([0.5, 0, 0])])
        return Crystal.create(name, [11] * 4 + [17] * 4, frac, 5.64 * np.eye(3))
    if name == "perovskite":
        frac = [[0, 0, 0], [0.5, 0.5, 0.52], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
        return Crystal.create(name, [56, 22, 8, 8, 8], frac, np.diag([3.9, 3.9, 4.1]))
    if name == "copper":
        return Crystal.create(name, [29], [[0, 0, 0]], 1.8 * (1 - np.eye(3)))
    frac = (np.indices((2, 2, 2)).reshape(3, -1).T / 2 + rng.uniform(-0.08, 0.08, (8, 3)))[:7]
    cell = np.array([[5.1, 0.2, -0.4], [1.3, 5.6, 0.3], [-0.7, 0.9, 6.2]])
    return Crystal.create(name, rng.integers(1, 90, 7), frac, cell)


NAMES = ("rocksalt", "irregular", "copper", "perovskite")


def crystals() -> list[Crystal]:
    return [crystal(name) for name in NAMES]


def doubled(batch: CrystalBatch) -> CrystalBatch:
    return batch.map_tensors(lambda t: t.double() if t.is_floating_point() else t)


def close(a, b, tolerance=2e-5, message=None):
    """Equal up to a fraction of the largest value."""
    scale = max(float(b.detach().abs().max()), 1.0)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, msg=message)


# The definitions


@TRAINING
@pytest.mark.parametrize("quotient", [False, True], ids=["full", "quotient"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=str
)
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_latents_gradients_and_statistics_are_those_of_the_definition(
    name, dtype, tolerance, quotient, training
):
    # On a quotient equal atoms drop together, on the full graph each for itself.
    dropout = {"dropout": 0.0} if quotient and name == "pddformer" else {}
    fast = tiny(name, training, **dropout).to(dtype)
    section = {k: v for k, v in fast.section.items() if k != "name"}
    plain = reference(fast, name, configure(ENCODERS[name].Config, section))
    full, batch = (build(crystals(), fast.graph, quotient=q) for q in (False, quotient))
    assert (batch.num_nodes < full.num_nodes) == quotient
    if dtype == torch.float64:
        full, batch = doubled(full), doubled(batch)
    weight = torch.randn(full.num_atoms, fast.dim, dtype=dtype)
    outputs = []
    for encoder, graph in ((fast, batch), (plain, full)):
        latents = encoder(graph)
        (latents * weight).sum().backward()
        outputs.append(latents)
    close(*outputs, tolerance)
    largest = max(float(p.grad.abs().max()) for p in plain.parameters())
    for key, parameter in plain.named_parameters():
        other = fast.get_parameter(key)
        close(other.grad / largest, parameter.grad / largest, tolerance, key)
    for key, buffer in plain.named_buffers():
        close(fast.get_buffer(key), buffer, tolerance, key)


def test_parameter_counts():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    pddformer, matformer = (
        build_encoder({"name": "pddformer"}),
        build_encoder({"name": "matformer"}),
    )
    assert count(pddformer) == 4_332_800
    assert [count(c) for c in pddformer.convs] == [855_296] * 4
    assert [count(g) for g in pddformer.gates] == [263_680] * 3
    assert count(ReadoutHead(256, 1)) == 66_049
    assert [count(c) for c in matformer.convs] == [544_256] * 5
    with_92 = build_encoder({"name": "matformer", "node_inputs": 92})
    assert count(with_92) + count(ReadoutHead(128, 1)) == 2_782_849
    assert count(matformer) - count(with_92) == 3_456


def test_pddformer_latents_are_positive_and_short_edges_are_clamped():
    encoder = tiny("pddformer")
    batch = build([crystal("irregular")], encoder.graph)
    assert (encoder(batch) > 0).all()
    at, beyond = (
        dataclasses.replace(batch, distances=torch.full_like(batch.distances, d))
        for d in (0.75 / 4, 0.16)
    )
    assert torch.equal(encoder(at), encoder(beyond))


def test_dropout_follows_the_keys_and_stops_in_eval():
    encoder = tiny("pddformer", training=True, dropout=0.5)
    samples = [[Sample.clean(c, rng_key=key) for c in crystals()] for key in (1, 1, 2)]
    first, same, other = (encoder(build(s, encoder.graph)) for s in samples)
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    encoder.eval()
    first, _, other = (encoder(build(s, encoder.graph)) for s in samples)
    assert torch.equal(first, other)


# The contract


@EVERY
def test_width_of_latents_and_section(name):
    encoder = tiny(name)
    batch = build(crystals(), encoder.graph)
    assert encoder(batch).shape == (batch.num_atoms, encoder.dim)
    assert encoder.nodes(batch).shape == (batch.num_nodes, encoder.dim)
    assert encoder.section["name"] == name


@EVERY
def test_packed_equals_one_by_one(name):
    encoder = tiny(name)
    packed = encoder(build(crystals(), encoder.graph))
    singly = torch.cat([encoder(build([c], encoder.graph)) for c in crystals()])
    close(packed, singly)


@EVERY
@TRAINING
def test_quotient_equals_full_graph(name, training):
    encoder = tiny(name, training)
    for module in encoder.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    full, quotient = (build(crystals(), encoder.graph, quotient=q) for q in (False, True))
    close(encoder(quotient), encoder(full), 1e-4)


@EVERY
def test_permutation_permutes(name):
    encoder, order = tiny(name), np.array([3, 6, 0, 5, 1, 4, 2])
    c = crystal("irregular")
    moved = Crystal.create("p", c.numbers[order], c.frac_coords[order], c.lattice)
    close(encoder(build([moved], encoder.graph)), encoder(build([c], encoder.graph))[order])


@EVERY
@pytest.mark.parametrize("kind", ["irregular", "rocksalt"])
def test_rotation_translation_and_images_change_nothing(name, kind):
    encoder, c = tiny(name), crystal(kind)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    rotation = q * np.sign(np.linalg.det(q))
    images = np.random.default_rng(1).integers(-2, 3, size=(len(c), 3))
    moved = {
        "rotation": (c.frac_coords, c.lattice @ rotation.T),
        "translation": (c.frac_coords + np.array([0.13, -0.71, 0.42]), c.lattice),
        "images": (c.frac_coords + images, c.lattice),
    }
    expected = encoder(build([c], encoder.graph))
    for what, (frac, lattice) in moved.items():
        other = Crystal.create("m", c.numbers, frac, lattice)
        close(encoder(build([other], encoder.graph)), expected, 1e-4, what)


@EVERY
def test_another_basis_of_the_lattice_changes_nothing(name):
    encoder, c = tiny(name), crystal("irregular")
    if encoder.graph.lattice_edges == "matformer" or name == "cspnet":
        pytest.skip("lattice edges, or waves along the axes, follow the given basis")
    basis = np.array([[1, 0, 0], [1, 1, 0], [0, -1, 1]])
    other = Crystal.create("b", c.numbers, c.frac_coords @ np.linalg.inv(basis), basis @ c.lattice)
    close(encoder(build([other], encoder.graph)), encoder(build([c], encoder.graph)), 1e-4)


@EVERY
def test_a_supercell_has_the_latents_of_the_cell(name):
    encoder, c = tiny(name), crystal("irregular")
    if not encoder.supercell:
        pytest.skip("not promised")
    frac = np.concatenate([c.frac_coords, c.frac_coords + np.array([1, 0, 0])]) / [2, 1, 1]
    other = Crystal.create("2", [*c.numbers] * 2, frac, c.lattice * [[2], [1], [1]])
    expected = encoder(build([c], encoder.graph))
    close(encoder(build([other], encoder.graph)), torch.cat([expected] * 2), 1e-4)


@pytest.mark.parametrize("nearest", ["alignn", "cgcnn"])
def test_a_supercell_is_the_same_where_own_images_count_once(nearest):
    encoder = build_encoder({"name": nearest, "tiny": True, "own_images_once": True}).eval()
    one = Crystal.create("1", [29], [[0, 0, 0]], 3 * np.eye(3))
    twice = Crystal.create("2", [29, 29], [[0, 0, 0], [0, 0.5, 0]], np.diag([3.0, 6.0, 3.0]))
    close(encoder(build([twice], encoder.graph))[0], encoder(build([one], encoder.graph))[0], 1e-5)


@EVERY
@pytest.mark.parametrize("quotient", [False, True], ids=["full", "quotient"])
def test_the_element_of_a_masked_atom_has_no_influence(name, quotient):
    encoder, c = tiny(name), crystal("irregular")
    masked = np.array([True, False, True, False, False, False, False])
    numbers = c.numbers.copy()
    numbers[masked] = [90, 1]
    other = Crystal.create("o", numbers, c.frac_coords, c.lattice)
    hidden, same, shown = (
        encoder(
            build([dataclasses.replace(Sample.clean(x), masked=m)], encoder.graph, (), quotient)
        )
        for x, m in ((c, masked), (other, masked), (c, ~masked & False))
    )
    assert torch.equal(hidden, same)
    assert not torch.allclose(hidden, shown)


@EVERY
def test_gradient_reaches_every_parameter(name):
    """In eval mode. In training a batch norm takes the mean away, and with it the gradient of
    every bias that does nothing but shift its input."""
    encoder = tiny(name)
    latents = encoder(build(crystals(), encoder.graph))
    (latents * torch.randn_like(latents)).sum().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), key


@EVERY
def test_training_is_bit_equal_when_repeated(name):
    results = []
    for _ in range(2):
        encoder = tiny(name, training=True)
        encoder(build(crystals(), encoder.graph)).square().sum().backward()
        results.append([*(p.grad for p in encoder.parameters()), *encoder.buffers()])
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


@EVERY
@TRAINING
def test_crystals_without_edges(name, training):
    encoder = tiny(name, training)
    batch = build(crystals(), encoder.graph)
    batch = dataclasses.replace(
        batch,
        edge_index=batch.edge_index[:, :0],
        edge_ptr=torch.zeros_like(batch.edge_ptr),
        edge_multiplicity=batch.edge_multiplicity[:0],
        edge_distance_row=batch.edge_distance_row[:0],
        distances=batch.distances[:0],
        edge_vector=None if batch.edge_vector is None else batch.edge_vector[:0],
        pair_sums=None if batch.pair_sums is None else batch.pair_sums[:0],
    )
    latents = encoder(batch)
    latents.square().sum().backward()
    assert torch.isfinite(latents).all()
    for key, parameter in encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), key


@EVERY
@TRAINING
def test_crystals_of_a_single_atom(name, training):
    encoder = tiny(name, training)
    cells = [Crystal.create(str(a), [29], [[0, 0, 0]], a * (1 - np.eye(3))) for a in (1.7, 1.8)]
    latents = encoder(build(cells if training else cells[:1], encoder.graph))
    assert torch.isfinite(latents).all()


@EVERY
@TRAINING
def test_bf16_autocast(name, training):
    encoder = tiny(name, training)
    batch = build(crystals(), encoder.graph)
    exact = encoder(batch).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = encoder(batch)
    latents.float().square().sum().backward()
    for key, parameter in encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.dtype == torch.float32
    assert (latents - exact).square().mean() < 1e-3 * exact.square().mean()


@EVERY
def test_state_dict_and_section_rebuild_the_encoder(name):
    encoder = tiny(name)
    other = build_encoder(encoder.section)
    other.load_state_dict(encoder.state_dict())
    batch = build(crystals(), encoder.graph)
    assert other.graph == encoder.graph
    assert torch.equal(other.eval()(batch), encoder(batch))


def test_listed_one_a_line_with_parameters_and_graph(capsys):
    runpy.run_module("crysforge.models.encoders", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(ENCODERS, lines, strict=True):
        encoder = build_encoder({"name": name})
        parameters = sum(p.numel() for p in encoder.parameters())
        assert line.split()[:2] == [name, f"{parameters:,}"]
        assert f"depth={encoder.graph.depth}" in line or encoder.graph.depth is None


# Configuration and plug-ins


@pytest.mark.parametrize(
    "section, message",
    [
        ({}, "needs a name"),
        ({"name": "pdformer"}, "did you mean 'pddformer'"),
        ({"name": "pddformer", "widht": 3}, "did you mean 'width'"),
        ({"name": "pddformer", "layers": 0}, "layers must be at least 1"),
        ({"name": "pddformer", "dropout": 1.0}, "dropout must be in"),
        ({"name": "pddformer", "rbf_bins": 1}, "at least 2 bins"),
        ({"name": "matformer", "heads": 0}, "heads must be at least 1"),
    ],
)
def test_bad_sections_say_what_would_be_right(section, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(section)


class Toy(Encoder):
    """An encoder from elsewhere."""

    Config, tiny = ENCODERS["matformer"].Config, ENCODERS["matformer"].tiny


@pytest.fixture
def plugins(monkeypatch):
    """Entry points as another package's metadata would declare them."""
    here = [
        EntryPoint("toy", f"{__name__}:Toy", "crysforge.encoders"),
        EntryPoint("broken", "no_such_package:Encoder", "crysforge.encoders"),
    ]
    monkeypatch.setattr(
        crysforge.models.registry,
        "entry_points",
        lambda group: here if group == here[0].group else [],
    )
    for name in ENCODERS.modules:  # ours stay when what is patched is undone
        ENCODERS[name]
    monkeypatch.setattr(ENCODERS, "_items", dict(ENCODERS._items))


def test_plugins_have_names_and_load_when_asked_for(plugins):
    assert {"toy", "broken", "pddformer"} <= set(ENCODERS)
    assert "toy" in ENCODERS
    assert ENCODERS["toy"] is Toy
    with pytest.raises(ValueError, match=r"plug-in encoder 'broken' \(no_such_package:Encoder\)"):
        ENCODERS["broken"]
    with pytest.raises(ValueError, match="did you mean 'toy'"):
        ENCODERS["toys"]
