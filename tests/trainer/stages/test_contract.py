"""Stages of other packages, and what every stage hands on: saved, rebuilt, taken, sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.models.encoders import build_encoder
from crysforge.trainer.runs.model_directory import export_stage, open_model
from crysforge.trainer.stages.base import STAGES, Stage, StageConfig
from crysforge.trainer.stages.made import SampleRequest
from tests import plugin
from tests.launching import FINETUNE, PRETRAIN

PAGE = (plugin.DOCS / "objectives.md").read_text()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's package, with a stage that is broken."""
    root = tmp_path / "site"
    root.mkdir()
    broken = {"broken": "raise RuntimeError('no licence')\n"}
    with plugin.installed(
        root, monkeypatch, broken, page=PAGE, registry=STAGES, absent="broken:Stage"
    ):
        yield


def test_the_pages_stage_pretrains_hands_on_and_is_finetuned(installed, data, call, tmp_path):
    small = ["volume.max_steps=3", "volume.batch_size=16"]
    job = [*PRETRAIN, *small, f"data={data}", "stages=[vae,volume]"]
    code, out, err = call("pretrain", *job, f"run_dir={tmp_path}/pre")
    assert code == 0, err
    assert "volume: finished after 3 steps; validation volume" in out
    model = open_model(tmp_path / "pre")
    assert model.stage == "volume" and model.build_stage().head.out_features == 1
    again = [*PRETRAIN, *small, f"data={data}", "stages=[volume]", f"init_from={tmp_path}/pre"]
    code, _, err = call("pretrain", *again, "volume.max_steps=1", f"run_dir={tmp_path}/more")
    assert code == 0, err
    finetune = [*FINETUNE, f"data={data}", f"init_from={tmp_path}/pre", "target=density"]
    code, _, err = call("finetune", *finetune, f"run_dir={tmp_path}/fine")
    assert code == 0, err


def test_a_broken_stage_is_an_error_where_it_is_asked_for_alone(installed, data, call, tmp_path):
    job = [*PRETRAIN, f"data={data}", f"run_dir={tmp_path}/run", "--dry-run"]
    assert call("pretrain", *job)[0] == 0
    code, _, err = call("pretrain", *job, "stages=[absent]")
    assert code == 2 and "'absent' (broken:Stage) does not load: RuntimeError: no licence" in err


def test_finetuning_is_no_stage_of_pretraining(data, call, tmp_path):
    job = [*PRETRAIN, f"data={data}", f"run_dir={tmp_path}/run", "stages=[vae,finetune]"]
    code, _, err = call("pretrain", *job)
    assert code == 2 and "launch/finetune.py" in err
    assert not (tmp_path / "run").exists()


class Dreamer(Stage):
    """Makes cubes, is built with more than an encoder, and starts from another stage's heads."""

    Config = StageConfig
    name = "dreamer"

    def __init__(self, config, encoder, edge=1.0):
        super().__init__()
        self.config, self.encoder, self.weights = config, encoder, {}
        self.element = torch.nn.Linear(encoder.dim, 119)
        self.register_buffer("edge", torch.tensor(edge))

    def take(self, before):
        self.element.load_state_dict(before.weights("heads.heads.atoms."))

    @classmethod
    def from_exported(cls, saved):
        stage = super().from_exported(saved)
        assert stage.edge > 0
        return stage

    def sample(self, request, generator):
        cells = float(self.edge) * (1 + torch.rand(request.count, generator=generator))
        atom = [[0.0, 0.0, 0.0]]
        return [
            Crystal.create(f"{i}", [29], atom, float(c) * np.eye(3)) for i, c in enumerate(cells)
        ]


@pytest.fixture
def dreamer(monkeypatch):
    monkeypatch.setitem(STAGES._items, "dreamer", Dreamer)
    encoder = build_encoder({"name": "pddformer", "tiny": True})
    return Dreamer(StageConfig(), encoder, edge=3.0)


def test_a_generative_stage_is_saved_rebuilt_and_sampled(dreamer, tmp_path):
    export_stage(tmp_path, dreamer, dreamer.state_dict(), {})
    back = open_model(tmp_path).build_stage()
    assert back.generative and float(back.edge) == 3.0
    request, draws = SampleRequest(count=3), [torch.Generator().manual_seed(1) for _ in range(2)]
    found, again = (s.sample(request, g) for s, g in zip((dreamer, back), draws, strict=True))
    assert [c.volume for c in found] == [c.volume for c in again] and len(found) == 3


def test_a_stage_that_makes_no_crystals_says_so():
    encoder = build_encoder({"name": "pddformer", "tiny": True})
    vae = STAGES["vae"](STAGES["vae"].Config(), encoder)
    assert not vae.generative
    with pytest.raises(ValueError, match="'vae' does not generate crystals"):
        vae.sample(SampleRequest(count=1), torch.Generator())


def test_a_stage_takes_more_than_the_encoder(dreamer, tmp_path):
    vae = STAGES["vae"](STAGES["vae"].Config(), build_encoder({"name": "pddformer", "tiny": True}))
    export_stage(tmp_path, vae, vae.state_dict(), {})
    dreamer.take(open_model(tmp_path))
    given = {k: v for k, v in vae.state_dict().items() if k.startswith("heads.heads.atoms.")}
    assert given
    for name, value in given.items():
        assert torch.equal(
            dreamer.state_dict()[name.replace("heads.heads.atoms", "element")], value
        )
