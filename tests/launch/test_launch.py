"""Launch scripts: the main job end to end on a tiny set, and one clear line for each mistake."""

from __future__ import annotations

import csv
import json
from itertools import islice

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crysforge import load
from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.datapipe.storage.dataset import DatasetWriter
from tests.launching import FINETUNE, PRETRAIN


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def scalars(path, name):
    events = EventAccumulator(str(path)).Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


def test_tensorboard_shows_every_term_once_a_step(runs):
    board = runs / "pre" / "tensorboard"
    for name in ("atoms", "coords", "lattice", "kl", "atom_accuracy", "loss"):
        assert [s for s, _ in scalars(board / "vae", f"train/{name}")] == [1, 2, 3]
    for name in (
        "optim/lr",
        "optim/grad_norm",
        "speed/crystals_per_s",
        "speed/atoms_per_s",
        "speed/data_wait",
        "memory/peak_gb",
        "train/latent_variance",
        "val/flow",
    ):
        points = scalars(board / "joint", name)
        assert points
        assert all(np.isfinite(v) for _, v in points)


def test_a_finetuned_run_reports_in_physical_units(runs, data, call):
    fine = runs / "fine"
    metrics = json.loads((fine / "metrics.json").read_text())
    rows = table(fine / "predictions_test.csv")
    error = np.mean([abs(float(r["prediction"]) - float(r["target"])) for r in rows])
    assert metrics["test"]["mae"] == pytest.approx(error, rel=1e-4)
    assert {"mean", "ridge"} <= metrics["baselines"]["density"].keys()
    for name in ("parity_test.png", "parity_val.png", "learning_curves.png"):
        assert (fine / name).read_bytes()[:4] == b"\x89PNG"
    # the exported model, on the shards themselves, gives the reported predictions
    output = runs / "again.csv"
    code, _, err = call(
        "predict", f"checkpoint={fine}", f"input={data}", f"output={output}", "workers=1"
    )
    assert code == 0, err
    again = {r["id"]: float(r["prediction"]) for r in table(output)}
    for r in rows:
        assert again[r["id"]] == pytest.approx(float(r["prediction"]), abs=1e-4)
    crystal = next(iter(prototypes(size=200, seed=1)))
    assert load(fine).predict(crystal) == pytest.approx(again[crystal.id], abs=1e-4)


def test_the_first_stages_encoder_can_be_taken(runs, data, call, tmp_path):
    code, _, err = call(
        "finetune",
        *FINETUNE,
        f"data={data}",
        f"run_dir={tmp_path}/f",
        f"init_from={runs}/pre",
        "init_stage=vae",
        "target=density",
        "label_fraction=0.5",
        "finetune.max_steps=1",
    )
    assert code == 0, err
    assert json.loads((tmp_path / "f" / "metrics.json").read_text())["labels"] == 27


def test_a_finished_run_is_not_run_again(runs, data, call):
    args = [*PRETRAIN, f"data={data}", f"run_dir={runs}/pre"]
    before = (runs / "pre" / "metrics.jsonl").read_text()
    code, out, _ = call("pretrain", *args)
    assert code == 0
    assert out.count("already finished") == 2
    assert (runs / "pre" / "metrics.jsonl").read_text() == before


def test_without_crystals_to_validate_on_no_loss_is_reported(call, tmp_path):
    with DatasetWriter(tmp_path / "data", []) as writer:
        for crystal in islice(prototypes(size=200, seed=0), 16):
            writer.add("train", crystal)
        writer.finish({})
    args = [f"data={tmp_path}/data", f"run_dir={tmp_path}/r", "stages=[vae]", "vae.max_steps=1"]
    code, out, err = call("pretrain", *PRETRAIN, *args)
    assert code == 0, err
    assert "finished after 1 steps; no crystals to validate on" in out
    assert "val/" not in (tmp_path / "r" / "metrics.jsonl").read_text()


def test_dry_run_writes_nothing(data, call, tmp_path):
    for script, args in (("pretrain", PRETRAIN), ("finetune", [*FINETUNE, "target=density"])):
        code, out, err = call(script, *args, f"data={data}", f"run_dir={tmp_path}/r", "--dry-run")
        assert code == 0, err
        assert "crystals" in out
        assert not (tmp_path / "r").exists()


MISTAKES = {
    "unknown key": ("pretrain", ["vae.epoch=3"], ["'vae.epoch'", "did you mean 'epochs'"]),
    "unknown encoder": ("pretrain", ["encoder.name=pdformer"], ["'pdformer'", "'pddformer'"]),
    "unknown stage": ("pretrain", ["stages=[vea]"], ["'vea'", "'vae'"]),
    "no data": ("pretrain", ["data="], ["'data'"]),
    "not a data set": ("pretrain", ["data={empty}"], ["{empty}", "not a data set"]),
    "used directory": ("pretrain", ["run_dir={used}"], ["{used}", "not empty"]),
    "another run": ("pretrain", ["run_dir={runs}/pre", "seed=7"], ["{runs}/pre", "another seed"]),
    "run refused": ("pretrain", ["run_dir={runs}/pre", "resume=never"], ["already holds a run"]),
    "wrong accumulation": ("pretrain", ["trainer.accumulation=3"], ["accumulation=3", "16"]),
    "unknown target": ("finetune", ["target=denstiy"], ["'denstiy'", "density"]),
    "no target": ("finetune", ["target="], ["'target'"]),
    "unfinished start": ("finetune", ["init_from={empty}"], ["{empty}", "no model"]),
    "unknown stage to start": (
        "finetune", ["init_from={runs}/pre", "init_stage=dpf"], ["'dpf'", "vae, joint"]),
    "another stage to start": (
        "finetune", ["run_dir={runs}/fine", "init_from={runs}/pre", "init_stage=vae"],
        ["{runs}/fine", "another init_stage"]),
    "another encoder": (
        "finetune", ["init_from={runs}/pre", "encoder.name=matformer"], ["pddformer", "matformer"]),
    "too many labels": ("finetune", ["label_count=1000"], ["label_count=1000", "54"]),
    "no checkpoint": ("predict", ["checkpoint={empty}"], ["{empty}", "no model"]),
    "no head": ("predict", ["checkpoint={runs}/pre"], ["finetune it"]),
    "no labels": ("finetune", ["label_count=-3"], ["label_count must be at least 1"]),
    "a step of nothing": ("pretrain", ["joint.batch_size=0"], ["batch_size must be at least 1"]),
    "no epoch": ("pretrain", ["joint.epochs=0"], ["joint.epochs"]),
    "no rise": ("pretrain", ["joint.pct_start=2"], ["pct_start"]),
    "a stage twice": ("pretrain", ["stages=[vae,vae]"], ["vae more than once"]),
    "no attention": ("pretrain", ["joint.dit.heads=0"], ["dit.heads"]),
    "no pause": ("pretrain", ["trainer.checkpoint_every=-5"], ["trainer.checkpoint_every"]),
    "a section as a value": ("pretrain", ["encoder=pddformer"], ["'encoder'", "encoder.NAME=…"]),
    "a value as a section": ("pretrain", ["vae.lr.max=1"], ["'vae.lr'", "give it a value"]),
    "no GPU": ("predict", ["device=cuda:99"], ["device=cuda:99", "give device=cpu"]),
    "no device": ("predict", ["device=gpu"], ["device 'gpu'", "cuda"]),
    "output is input": ("predict", ["output={data}", "overwrite=true"], ["is the input"]),
    "no input": ("predict", ["input={empty}/x.csv"], ["x.csv", "does not exist"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, runs, data, call, tmp_path):
    places = {"empty": tmp_path / "empty", "used": tmp_path / "used", "runs": runs, "data": data}
    places["empty"].mkdir()
    places["used"].mkdir()
    (places["used"] / "notes.txt").write_text("mine")
    script, args, words = MISTAKES[name]
    base = {
        "pretrain": [*PRETRAIN, f"data={data}", f"run_dir={tmp_path}/new"],
        "finetune": [*FINETUNE, f"data={data}", f"run_dir={tmp_path}/new", "target=density"],
        "predict": [f"checkpoint={runs}/fine", f"input={data}", f"output={tmp_path}/new",
                    "workers=1"],
    }[script]  # fmt: skip
    code, _, err = call(script, *base, *(a.format(**places) for a in args))
    lines = [x for x in err.splitlines() if x.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1, err
    for word in words:
        assert word.format(**places) in lines[0], lines[0]
    assert not (tmp_path / "new").exists()
    assert list(places["empty"].iterdir()) == []
    assert [p.name for p in places["used"].iterdir()] == ["notes.txt"]


def test_where_nothing_can_be_predicted_nothing_is_replaced(runs, call, tmp_path):
    (tmp_path / "bad.cif").write_text("nonsense")
    output = tmp_path / "out.csv"
    output.write_text("mine")
    arguments = [f"checkpoint={runs}/fine", f"input={tmp_path}/bad.cif", f"output={output}"]
    code, _, err = call("predict", *arguments, "overwrite=true")
    assert code == 2
    assert f"bad.cif could be used: {tmp_path}/out.dropped.csv says why" in err.splitlines()[-1]
    assert output.read_text() == "mine"
    assert [row["reason"] for row in table(tmp_path / "out.dropped.csv")] == ["unreadable"]
