"""A loaded model: physical invariances, input types, and refusal of what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from crysforge import load
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.models.encoders import build_encoder
from crysforge.trainer.runs.model_directory import (
    Scaler,
    export_stage,
    open_model,
    take_encoder,
)
from crysforge.trainer.stages.finetune import FinetuneConfig, FinetuneStage
from crysforge.trainer.stages.vae import VAEConfig, VAEStage


def structures(count: int = 6) -> list[Structure]:
    """Random crystals with distances that crystals have."""
    rng = np.random.default_rng(0)
    out: list[Structure] = []
    while len(out) < count:
        n = int(rng.integers(2, 9))
        cell = Lattice.from_parameters(*rng.uniform(4, 7, 3), *rng.uniform(70, 110, 3))
        found = Structure(cell, rng.integers(3, 80, n).tolist(), rng.random((n, 3)))
        out += [found] if found.is_valid(0.6) else []
    return out


def finetuned(path, name: str, targets=("gap",)):
    torch.manual_seed(0)
    scaler = Scaler(
        list(targets), ["eV"] * len(targets), [1.5] * len(targets), [0.7] * len(targets)
    )
    encoder = build_encoder({"name": name, "tiny": True})
    stage = FinetuneStage(FinetuneConfig(), encoder, targets, scaler.mean, scaler.std)
    export_stage(path, stage, stage.state_dict(), {}, scaler)
    return load(path)


@pytest.fixture(params=["pddformer", "matformer"])
def model(request, tmp_path):
    return finetuned(tmp_path / "model", request.param)


def test_predictions_do_not_see_frame_order_or_origin(model):
    rng = np.random.default_rng(1)
    for s in structures():
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        order = rng.permutation(len(s))
        moved = Structure(
            s.lattice.matrix @ rotation.T,
            [s[int(i)].specie for i in order],
            (s.frac_coords + rng.random(3))[order] + rng.integers(-2, 3, (len(s), 3)),
        )
        assert model.predict(moved) == pytest.approx(model.predict(s), abs=1e-4)
        np.testing.assert_allclose(model.embed(moved), model.embed(s), atol=1e-4)


def test_batches_and_input_types_agree(model):
    many = structures()
    together = model.predict(many, max_atoms=10)
    assert together.shape == (len(many),)
    assert len(set(together.round(4))) == len(many)
    for s, value in zip(many, together, strict=True):
        assert model.predict(s) == pytest.approx(value, abs=1e-5)
        assert model.predict(s.to_ase_atoms()) == pytest.approx(value, abs=1e-4)
        assert model.predict(Crystal.from_pymatgen(s)) == pytest.approx(value, abs=1e-5)
    assert model.embed(many).shape == (len(many), model.encoder.dim)
    assert model.predict([]).shape == (0,)


def test_several_targets_come_as_columns(tmp_path):
    model = finetuned(tmp_path, "pddformer", ("gap", "density"))
    assert model.predict(structures(3)).shape == (3, 2)
    assert model.predict(structures(1)[0]).shape == (2,)


def test_bad_structures_are_named(model):
    disordered = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    with pytest.raises(BadCrystal, match="structure 1: partial occupancy"):
        model.predict([structures(1)[0], disordered])
    with pytest.raises(BadCrystal, match="structure 0: float is no structure: give a pymatgen"):
        model.predict([0.5])
    with pytest.raises(ValueError, match="input 'NaCl' does not exist"):
        model.predict(["NaCl"])


def test_a_pretrained_encoder_embeds_but_does_not_predict(tmp_path):
    encoder = build_encoder({"name": "pddformer", "tiny": True})
    stage = VAEStage(VAEConfig(), encoder)
    export_stage(tmp_path, stage, stage.state_dict(), {})
    model = load(tmp_path)
    assert model.embed(structures(2)).shape == (2, encoder.dim)
    with pytest.raises(ValueError, match="finetune it with"):
        model.predict(structures(1))


def test_another_encoders_checkpoint_is_refused(tmp_path):
    finetuned(tmp_path, "pddformer")
    exported = open_model(tmp_path)
    assert take_encoder(exported, {}).section["name"] == "pddformer"
    with pytest.raises(ValueError, match=r"holds encoder 'pddformer'.*asks for 'matformer'"):
        take_encoder(exported, {"name": "matformer", "tiny": True})
    with pytest.raises(ValueError, match=r"width=32.*width=48"):
        take_encoder(exported, {"name": "pddformer", "tiny": True, "width": 48})


def test_places_without_a_model_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model"):
        load(tmp_path)
    (tmp_path / "model.yaml").write_text("schema: 99\n")
    with pytest.raises(ValueError, match="schema 99"):
        load(tmp_path)
