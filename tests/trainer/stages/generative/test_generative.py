"""What every generative stage promises: invariance, exact averages, and crystals that depend on
their own key alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.lattice import from_log_metric as from_log_metric_numpy
from crysforge.datapipe.crystals.lattice import log_metric as log_metric_numpy
from crysforge.datapipe.graphs.packing import build
from crysforge.models.denoisers.lattice_numbers import from_log_metric, log_metric
from crysforge.models.denoisers.pair_layout import PairLayout
from crysforge.models.encoders import build_encoder
from crysforge.trainer.engines.base import EngineConfig
from crysforge.trainer.loop.memory import plan_memory
from crysforge.trainer.runs.model_directory import export_stage, open_model
from crysforge.trainer.stages.base import STAGES, count_parameters
from crysforge.trainer.stages.made import SampleRequest
from tests.generative import NOISY, PRESETS, make, wanted
from tests.objectives import collate
from tests.trainer.loop.test_host_sync import check

each_preset = pytest.mark.parametrize("preset", PRESETS)


@pytest.fixture
def crystals(random_crystal):
    rng = np.random.default_rng(0)
    return [random_crystal(rng, 1 + i % 4, f"c{i}") for i in range(7)]


def loss_of(stage, batch):
    terms = stage(batch)
    return sum(w * terms[k].total / terms[k].count.clamp(min=1) for k, w in stage.weights.items())


def doubled(batch):
    return batch.map_tensors(lambda t: t.double() if t.is_floating_point() else t)


def test_published_sizes():
    """12,294,656 parameters of DiffCSP's network, 12,346,468 with elements."""
    size = {"name": "cspnet", "width": 512, "layers": 6, "channels": 100, "lattice": "matrix"}
    csp = STAGES["csp"]
    config = csp.Config(coords="wrapped_gaussian", lattice="gaussian", sampling=NOISY)
    assert count_parameters(csp(config, build_encoder(size))) == 12_294_656
    ab_initio = STAGES["ab_initio"]
    encoder = build_encoder({**size, "elements": "vector"})
    assert count_parameters(ab_initio(ab_initio.Config(), encoder)) == 12_346_468


@each_preset
def test_gradient_reaches_every_parameter_and_the_loss_falls(preset, crystals):
    stage = make(preset)
    stage.look(crystals)
    batch = collate(stage, crystals)
    optimizer = torch.optim.Adam(stage.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(loss_of(stage, batch))
        losses[-1].backward()
        for key, p in stage.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), key
        optimizer.step()
    assert losses[-1] < losses[0]


@each_preset
def test_sums_of_parts_are_those_of_the_whole(preset, crystals):
    """So that two ranks learn what one learns."""
    stage = make(preset).double()
    stage.look(crystals)

    def terms(part):
        return stage(doubled(collate(stage, part)))

    whole, parts = terms(crystals), [terms(crystals[:3]), terms(crystals[3:])]
    for name, term in whole.items():
        for kind in ("total", "count"):
            found = sum(getattr(p[name], kind) for p in parts)
            torch.testing.assert_close(found, getattr(term, kind), rtol=1e-5, atol=1e-6)


@each_preset
def test_nothing_waits_for_the_device(preset, crystals, monkeypatch):
    stage = make(preset).train()
    check(stage, collate(stage, crystals), monkeypatch)


@each_preset
def test_memory_is_known_before(preset, crystals):
    stage = make(preset)
    plan = plan_memory(stage, collate(stage, crystals), EngineConfig(), 1, False)
    assert plan.activations > 0


def predictions(stage, crystal, turn=None):
    """Of a crystal taken for a state, in double precision."""
    batch = doubled(build([crystal], stage.encoder.graph))
    state = stage.clean(batch)
    if turn is not None:
        state["lattice"] = (state["lattice"].view(-1, 3, 3) @ turn).flatten(1)
    layout = PairLayout.of(batch.batch, batch.ptr)
    level = torch.full((1,), 0.3, dtype=torch.float64)
    return stage.predict(state, level, layout, batch.ptr)


@each_preset
def test_symmetries(preset, random_crystal):
    stage, rng = make(preset).double(), np.random.default_rng(3)
    crystal = random_crystal(rng, 5, "a")
    base = predictions(stage, crystal)

    def moved(frac, numbers=crystal.numbers):
        return predictions(stage, Crystal.create("b", numbers, frac, crystal.lattice))

    shift = moved(crystal.frac_coords + np.array([0.13, -0.7, 0.31]))
    images = moved(crystal.frac_coords + rng.integers(-3, 4, (5, 3)))
    order = np.array([3, 1, 4, 0, 2])
    swapped = moved(crystal.frac_coords[order], crystal.numbers[order])
    close = {"rtol": 0, "atol": 1e-4}  # coordinates reach a batch in single precision
    for name, value in base.items():
        torch.testing.assert_close(shift[name], value, **close)
        torch.testing.assert_close(images[name], value, **close)
        rows = value if name == "lattice" else value[torch.from_numpy(order)]
        torch.testing.assert_close(swapped[name], rows, **close)
    if stage.encoder.config.lattice == "matrix":
        turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
        turned = predictions(stage, crystal, turn)
        torch.testing.assert_close(turned["coords"], base["coords"])
        expected = (base["lattice"].view(-1, 3, 3) @ turn).flatten(1)
        torch.testing.assert_close(turned["lattice"], expected)


@each_preset
def test_a_saved_stage_draws_the_same(preset, crystals, tmp_path):
    stage = make(preset).eval()
    stage.look(crystals)
    export_stage(tmp_path, stage, stage.state_dict(), {})
    back = open_model(tmp_path).build_stage()
    assert back.generative
    for one, other in zip(stage.draw(wanted(stage)), back.draw(wanted(back)), strict=True):
        for name in ("numbers", "frac_coords", "lattice"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


@each_preset
def test_a_sample_does_not_depend_on_its_batch(preset, crystals):
    """Draws are equal to the bit, so that in double precision only rounding is left."""
    stage = make(preset).double().eval()
    stage.look(crystals)
    asked = wanted(stage)
    whole = stage.draw(asked)
    for part in ([2, 0], [3], [1]):
        for number, crystal in zip(part, stage.draw([asked[i] for i in part]), strict=True):
            away = crystal.frac_coords - whole[number].frac_coords
            assert np.abs(away - np.rint(away)).max() < 1e-6
            np.testing.assert_allclose(crystal.lattice, whole[number].lattice, rtol=1e-6)
            assert np.array_equal(crystal.numbers, whole[number].numbers)
    counts = [len(c) for c in whole]
    assert counts == [3, 1, 4, 2]


def test_a_request_of_the_contract(crystals):
    stage = make("csp_flow")
    draws = torch.Generator().manual_seed(0)
    found = stage.sample(SampleRequest(count=2, formula="NaCl", formula_units=2), draws)
    assert [sorted(c.numbers.tolist()) for c in found] == [[11, 11, 17, 17]] * 2
    with pytest.raises(ValueError, match="needs a formula"):
        stage.sample(SampleRequest(count=1), draws)
    chooses = make("masked")
    chooses.look(crystals)
    sizes = {len(c) for c in chooses.sample(SampleRequest(count=12), draws)}
    assert sizes <= {1, 2, 3, 4} and len(sizes) > 1
    with pytest.raises(ValueError, match="chooses elements itself"):
        chooses.sample(SampleRequest(count=1, formula="NaCl"), draws)


@pytest.mark.parametrize("preset", ["ab_initio", "masked"])
def test_only_wanted_elements_are_chosen(preset):
    stage = make(preset)
    asked = [replace(w, elements=(3, 8)) for w in wanted(stage)]
    for crystal in stage.draw(asked):
        assert set(crystal.numbers.tolist()) <= {3, 8}


def test_elements_without_a_channel_are_refused(crystals):
    encoder = build_encoder({"name": "cspnet", "tiny": True, "channels": 5})
    stage = STAGES["csp"](STAGES["csp"].Config(), encoder)
    with pytest.raises(ValueError, match=r"encoder\.channels=118 instead of 5"):
        stage.look(crystals)


@pytest.mark.parametrize(
    "encoder, settings, message",
    [
        ({"name": "pddformer"}, {}, "needs encoder.name=cspnet"),
        ({"name": "cspnet", "lattice": "matrix"}, {}, "log_metric"),
        ({"name": "cspnet"}, {"coords": "torus"}, "did you mean 'torus_linear'"),
    ],
)
def test_what_does_not_fit_is_refused(encoder, settings, message):
    with pytest.raises(ValueError, match=message):
        STAGES["csp"](STAGES["csp"].Config(**settings), build_encoder({"tiny": True, **encoder}))


def test_lattice_numbers_are_those_of_the_loader(random_crystal):
    rng = np.random.default_rng(1)
    found = [random_crystal(rng, n, str(n)) for n in (1, 3, 8)]
    cells = torch.from_numpy(np.stack([c.lattice for c in found]))
    atoms = torch.tensor([len(c) for c in found])
    numbers = log_metric(cells, atoms)
    expected = np.stack([log_metric_numpy(c.lattice, len(c)) for c in found])
    np.testing.assert_allclose(numbers, expected, atol=1e-10)
    back = np.stack(
        [from_log_metric_numpy(x, len(c)) for x, c in zip(expected, found, strict=True)]
    )
    np.testing.assert_allclose(from_log_metric(numbers, atoms), back, rtol=1e-9)
    assert torch.isfinite(from_log_metric(torch.full((1, 6), 1e9), torch.ones(1))).all()
