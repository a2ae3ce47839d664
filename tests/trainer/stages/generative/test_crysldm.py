"""CrysLDM: what stage 1 codes stage 2 can decode, and nothing of stage 1 learns there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crysforge import load
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.datapipe.graphs.packing import build
from crysforge.models.denoisers.pair_layout import PairLayout
from crysforge.models.encoders import build_encoder
from crysforge.models.encoders.cspnet import CSPEncoderConfig
from crysforge.models.generative.sampler import SamplingConfig
from crysforge.trainer.runs.model_directory import export_stage, open_model
from crysforge.trainer.stages.base import STAGES
from crysforge.trainer.stages.generative.crysldm_vae import posterior
from tests.generative import wanted
from tests.objectives import collate

SMALL = {"width": 16, "layers": 1, "frequencies": 4}
each_lattice = pytest.mark.parametrize("lattice", ["log_metric", "matrix"])


@pytest.fixture
def crystals(random_crystal):
    rng = np.random.default_rng(0)
    return [random_crystal(rng, 1 + i % 4, f"c{i}") for i in range(8)]


def first(lattice, crystals):
    torch.manual_seed(0)
    cls = STAGES["crysldm_vae"]
    encoder = build_encoder({"name": "cspnet", "lattice": lattice, **SMALL})
    stage = cls(cls.Config(latent_dim=4), encoder)
    stage.look(crystals)
    return stage


def second(vae, crystals, path):
    cls = STAGES["crysldm"]
    export_stage(path, vae, vae.state_dict(), {})
    saved = open_model(path)
    sampling = SamplingConfig(steps=5, method="ancestral", corrector=0.1)
    config = cls.Config(
        timesteps=10, latent_dim=4, denoiser=CSPEncoderConfig(**SMALL), sampling=sampling
    )
    stage = cls(config, saved.build_encoder())
    stage.look(crystals)
    stage.take(saved)
    return stage


def total(stage, batch):
    terms = stage(batch)
    return sum(w * terms[k].total / terms[k].count for k, w in stage.weights.items())


@each_lattice
def test_both_stages_learn_and_the_first_is_frozen_in_the_second(lattice, crystals, tmp_path):
    vae = first(lattice, crystals)
    batch = collate(vae, crystals)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(total(vae, batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    stage = second(vae, crystals, tmp_path)
    assert stage.atoms_scale != 1 and stage.lattice_scale != 1
    total(stage, batch).backward()
    for name, p in stage.named_parameters():
        frozen = name.startswith(("encoder.", "code."))
        assert (p.grad is None) == frozen, name
        if not frozen:
            assert p.grad.any(), name
    for name, p in vae.code.named_parameters():
        assert torch.equal(p, stage.code.get_parameter(name))


@each_lattice
def test_what_is_coded_is_decoded(lattice):
    """After some training the elements come back, from the latents' means."""
    crystals = list(prototypes(size=200, seed=1))[:8]
    vae = first(lattice, crystals)
    batch = collate(vae, crystals)
    optimizer = torch.optim.Adam(vae.parameters(), 5e-3)
    for step in range(200):
        batch.rng_key = torch.arange(len(crystals)) + 100 * step  # new draws in every step
        optimizer.zero_grad()
        total(vae, batch).backward()
        optimizer.step()
    layout = PairLayout.of(batch.batch, batch.ptr)
    atoms, cells, _ = posterior(vae.encoder, vae.code, batch, layout)
    z, cell = atoms.mean, cells.mean
    scores, _ = vae.code.decode(z, cell, batch.frac_coords, layout, batch.ptr)
    assert (scores.argmax(1) + 1 == batch.numbers).float().mean() > 0.6  # chance: 0.1


def test_a_matrix_latent_turns_with_the_crystal(crystals):
    vae = first("matrix", crystals)
    crystal = crystals[3]
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    found = []
    for spin in (torch.eye(3), turn):
        batch = build([crystal], vae.encoder.graph)
        batch.lattice = batch.lattice @ spin
        layout = PairLayout.of(batch.batch, batch.ptr)
        atoms, cells, _ = posterior(vae.encoder, vae.code, batch, layout)
        scores, cell = vae.code.decode(atoms.mean, cells.mean, batch.frac_coords, layout, batch.ptr)
        found.append((atoms.mean, cells.mean.view(3, 3) @ spin.T, scores, cell.view(3, 3) @ spin.T))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@each_lattice
def test_a_saved_second_stage_draws_the_same(lattice, crystals, tmp_path):
    stage = second(first(lattice, crystals), crystals, tmp_path / "1").eval()
    export_stage(tmp_path / "2", stage, stage.state_dict(), {})
    back = open_model(tmp_path / "2").build_stage()
    keys = torch.arange(3) * 7
    asked = wanted(stage)
    for one, other in zip(stage.draw(asked), back.draw(asked), strict=True):
        if isinstance(one, Crystal):
            assert np.array_equal(one.lattice, other.lattice)
            assert np.array_equal(one.numbers, other.numbers)
    assert set(stage.sizes(keys)) <= {1, 2, 3, 4}


def test_another_stage_before_is_refused(crystals, tmp_path):
    csp = STAGES["csp"]
    before = csp(csp.Config(), build_encoder({"name": "cspnet", **SMALL}))
    with pytest.raises(ValueError, match=r"stages=\[crysldm_vae,crysldm\]"):
        second(before, crystals, tmp_path)


def test_pretrained_and_generated(data, call, tmp_path):
    small = ["encoder.width=16", "encoder.layers=1", "encoder.frequencies=4", "loader.workers=0"]
    stages = ["crysldm_vae.max_steps=2", "crysldm_vae.batch_size=16", "crysldm.max_steps=2",
              "crysldm.batch_size=16", "crysldm.timesteps=6", "crysldm.sampling.steps=6",
              "crysldm.denoiser.width=16", "crysldm.denoiser.layers=1"]  # fmt: skip
    job = ["--config=pretrain/crysldm", *small, *stages, f"data={data}", f"run_dir={tmp_path}/run"]
    code, out, err = call("pretrain", *job)
    assert code == 0, err
    assert "crysldm: finished after 2 steps" in out
    again = call("pretrain", *job)
    assert again[0] == 0 and "already finished" in again[1]
    code, out, err = call("generate", f"checkpoint={tmp_path}/run", "n=4", f"output={tmp_path}/o")
    assert code == 0, err
    found = load(tmp_path / "run").generate(n=2, atoms=3)
    assert all(len(s) == 3 for s in found)
