"""An exported model is all that predicting and finetuning need, and says what it is."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from crysforge import load
from crysforge.datapipe.crystals.prototypes import TARGETS, UNITS, prototypes
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.trainer.base.script import run
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.model_directory import lineage, open_checkpoint, open_model

SMALL = ["encoder.name=pddformer", "encoder.tiny=true", "encoder.width=16", "loader.workers=0"]
PRETRAIN = [
    *SMALL, "vae.batch_size=16", "vae.max_steps=2", "joint.batch_size=16", "joint.max_steps=2",
    "joint.dit.width=32", "joint.dit.layers=1", "joint.dit.heads=2", "trainer.log_every=1",
]  # fmt: skip
FINETUNE = ["loader.workers=0", "targets=[density,ewald_energy]", "finetune.max_steps=4"]
FILES = {"model.safetensors", "config.yaml", "README.md"}


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a launch script in this process: (exit code, its output)."""

    def call(script: str, *args: str) -> tuple[int, str]:
        module, code = importlib.import_module(f"crysforge.launch.{script}"), 0
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        try:
            run(module.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, "".join(capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A data set, a run of both pretraining stages, and one finetuned from it."""
    root = tmp_path_factory.mktemp("runs")
    with DatasetWriter(root / "set", list(TARGETS), units=dict(UNITS)) as writer:
        for i, crystal in enumerate(prototypes(size=200, seed=3)):
            if i < 60:
                writer.add(("train", "train", "train", "val", "test")[i % 5], crystal)
        writer.finish({"sources": [{"name": "toy.csv"}], "filters": {"max_atoms": 20}})
    argv = sys.argv
    try:
        for script, *args in (
            ["pretrain", *PRETRAIN, "run_dir=pre"],
            ["finetune", *FINETUNE, "run_dir=fine", "init_from=pre"],
        ):
            args = [a.replace("run_dir=", f"run_dir={root}/") for a in args]
            args = [a.replace("init_from=", f"init_from={root}/") for a in args]
            sys.argv = [script, f"data={root / 'set'}", *args]
            importlib.import_module(f"crysforge.launch.{script}").main()
    finally:
        sys.argv = argv
    return root


@pytest.fixture(scope="module")
def crystals(runs):
    dataset = Dataset.open(runs / "set")
    return [c for _, c in dataset.read(dataset.split_items("test"))]


def export(call, checkpoint: Path, output: Path, *args: str) -> Path:
    code, text = call("export", f"checkpoint={checkpoint}", f"output={output}", *args)
    assert code == 0, text
    return output


def test_a_finetuned_model_predicts_as_its_run(runs, crystals, call, tmp_path):
    shared = export(call, runs / "fine", tmp_path / "a" / "shared", "license=mit")
    assert {p.name for p in shared.iterdir()} == FILES | {"scaler.json"}
    moved = Path(shutil.move(shared, tmp_path / "moved"))
    model, own = load(moved), load(runs / "fine")
    assert (model.targets, model.units) == (["density", "ewald_energy"], ["g/cm^3", "eV/atom"])
    assert (model.predict(crystals) == own.predict(crystals)).all()
    assert (model.embed(crystals) == own.embed(crystals)).all()
    table = tmp_path / "p.csv"
    code, _ = call("predict", f"checkpoint={moved}", f"input={runs / 'set'}", f"output={table}")
    assert code == 0 and len(table.read_text().splitlines()) == 61


@pytest.mark.parametrize("stage", ["vae", "joint"])
def test_a_pretrained_stage_is_a_start(stage, runs, crystals, call, tmp_path):
    shared = export(call, runs / "pre", tmp_path / "shared", f"stage={stage}")
    assert {p.name for p in shared.iterdir()} == FILES
    own = open_model(runs / "pre", stage)
    assert own.stage == stage
    assert (load(shared).embed(crystals) == load(runs / "pre", stage).embed(crystals)).all()
    for start in (f"init_from={shared}", f"init_from={runs / 'pre'}"):
        code, text = call(
            "finetune", *FINETUNE, f"data={runs / 'set'}", start,
            f"run_dir={tmp_path / start.replace('/', '-')}",
            *([f"init_stage={stage}"] if start.endswith("pre") else []),
        )  # fmt: skip
        assert code == 0, text
    one, other = [
        load_file(p / "finetune" / "model.safetensors") for p in sorted(tmp_path.glob("init_*"))
    ]
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_export_of_an_export_is_the_same_model(runs, crystals, call, tmp_path):
    one = export(call, runs / "fine", tmp_path / "one")
    two = export(call, one, tmp_path / "two")
    assert (load(one).predict(crystals) == load(two).predict(crystals)).all()


def test_the_card_says_what_the_model_is(runs, call, tmp_path):
    shared = export(call, runs / "fine", tmp_path / "shared", "license=cc-by-4.0")
    config = yaml.safe_load((shared / "config.yaml").read_text())
    card = (shared / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == config["license"] == "cc-by-4.0"
    assert "pddformer" in head["tags"]
    manifest = Dataset.open(runs / "set").manifest
    metrics = json.loads((runs / "fine" / "metrics.json").read_text())
    model = load(runs / "fine")
    numbers = sum(p.numel() for p in model.encoder.parameters())
    for words in (
        "`density` in g/cm^3, `ewald_energy` in eV/atom", 'load("DIR")', "toy.csv", "max_atoms: 20",
        manifest.fingerprint, "train 36, val 12, test 12", f"{numbers:,} parameters",
        f"| test | 12 | {metrics['test']['density']['mae']:.4g} |", "seed: 0", "lr: 0.001",
        f"torch {torch.__version__}", "started from | encoder of stage joint",
        "before that: encoder of stage vae",
    ):  # fmt: skip
        assert words in card, words
    assert str(runs) not in card + (shared / "config.yaml").read_text()  # no path of this machine
    assert config["start"] == lineage(runs / "pre")
    assert config["start"]["start"]["stage"] == "vae"
    assert (
        "licence | not stated" in (export(call, shared, tmp_path / "b") / "README.md").read_text()
    )


def test_a_pretrained_models_card(runs, call, tmp_path):
    card = (export(call, runs / "pre", tmp_path / "shared") / "README.md").read_text()
    assert "It predicts no property" in card and "model.embed" in card
    assert "validation | step 2, " in card and "flow" in card


def pruned(patch):
    """`RunDirectory.load` of a run that goes on: at the first call a newer one takes its place."""
    load = RunDirectory.load

    def gone(self, path):
        patch.setattr(RunDirectory, "load", load)
        path.rename(path.with_name("finetune-00000002"))
        return load(self, path)

    return gone


def test_checkpoints_of_a_run_that_is_not_finished(runs, crystals, call, tmp_path, monkeypatch):
    for name, args in {
        "pre": ["pretrain", *PRETRAIN],
        "fine": ["finetune", *FINETUNE, f"init_from={runs / 'pre'}", "trainer.ema_decay=0.9"],
    }.items():
        place = tmp_path / name
        args += [f"data={runs / 'set'}", f"run_dir={place}", "trainer.walltime_minutes=0"]
        assert call(*args)[0] == 75
        code, text = call("export", f"checkpoint={place}", f"output={tmp_path / 'x'}")
        assert code == 2 and "tag=newest" in text and not (tmp_path / "x").exists()
        shared = export(call, place, tmp_path / f"{name}-shared", "tag=newest")
        exported, weights, tag = open_checkpoint(place)
        assert tag == f"{exported.stage}-00000001"
        assert f"Taken from checkpoint `{tag}`" in (shared / "README.md").read_text()
        kept = load_file(shared / "model.safetensors")
        assert all(torch.equal(kept[key], weights[key]) for key in kept | weights)
        assert np.isfinite(load(shared).embed(crystals)).all()
    assert np.isfinite(load(shared).predict(crystals)).all()
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "load", pruned(patch))
        assert open_checkpoint(place)[2] == "finetune-00000002"
    tag = "finetune-00000002"
    saved = load_file(place / "checkpoints" / tag / "average.safetensors")
    assert all(torch.equal(kept[key], saved[key]) for key in saved)


def test_mistakes_are_named_and_leave_nothing(runs, call, tmp_path):
    output = f"output={tmp_path / 'out'}"
    for args, words in (
        ([], "'output' is required"),
        ([output, "stage=dpf"], "has no finished stage 'dpf'; finished: vae, joint"),
        ([output, "tag=vae-00000009"], "has no checkpoint 'vae-00000009'; it has: none"),
        ([output, "tag=newest", "stage=vae"], "not both"),
        ([f"output={runs / 'fine'}"], "exists: choose another output"),
    ):
        code, text = call("export", f"checkpoint={runs / 'pre'}", *args)
        assert code == 2 and words in text, text
    code, text = call("export", f"checkpoint={runs / 'set'}", output)
    assert code == 2 and "holds no model" in text
    broken = Path(shutil.copytree(runs / "fine", tmp_path / "broken"))
    file = broken / "finetune" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    code, text = call("export", f"checkpoint={broken}", output)
    assert code == 2 and "model.safetensors is not a readable" in text
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]
