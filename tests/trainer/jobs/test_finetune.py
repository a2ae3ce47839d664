"""Ways of finetuning: with a linear head, until nothing gets better, and not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crysforge import load
from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.launch import finetune
from crysforge.models.encoders import build_encoder
from crysforge.trainer.base.tensors import load_tensors
from crysforge.trainer.jobs import finetuning as reports
from crysforge.trainer.jobs import setup as jobs
from crysforge.trainer.jobs.labels import with_label
from crysforge.trainer.jobs.schemas import FinetuneJob
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.logger import read_metrics
from crysforge.trainer.stages.finetune import FinetuneConfig, FinetuneStage
from tests.launching import FINETUNE


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A data set with a class of dense crystals, and labels that are none."""
    root = tmp_path_factory.mktemp("classes") / "set"
    targets = ("is_dense", "always", "three")
    with DatasetWriter(root, list(targets)) as writer:
        for i, crystal in enumerate(islice(prototypes(size=200, seed=1), 90)):
            values = (float(crystal.targets["density"] > 2.9), 1.0, float(i % 3))
            labels = dict(zip(targets, values, strict=True))
            split = ("train", "train", "train", "val", "test")[i % 5]
            writer.add(split, crystal.with_targets(labels))
        writer.finish({})
    return root


def test_a_class_is_learned_and_told_by_its_probability(classes, call, tmp_path):
    run, job = tmp_path / "run", [*FINETUNE, f"data={classes}", "finetune.task=classification"]
    code, out, err = call(
        "finetune", *job, f"run_dir={run}", "target=is_dense", "finetune.epochs=20"
    )
    assert code == 0, err
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"]["roc_auc"] > 0.7 and f"ROC AUC {metrics['test']['roc_auc']:.4g}" in out
    rows = (run / "predictions_test.csv").read_text().splitlines()[1:]
    p = np.array([float(row.split(",")[2]) for row in rows])
    y = np.array([float(row.split(",")[1]) for row in rows])
    assert ((p >= 0) & (p <= 1)).all()
    assert metrics["test"]["accuracy"] == pytest.approx(((p > 0.5) == y).mean())
    best = dict(read_metrics(run, "finetune")["val/bce"])
    assert metrics["best_step"] == min(best, key=best.get)
    crystals = [c for _, c in Dataset.open(classes).read(Dataset.open(classes).split_items("test"))]
    np.testing.assert_allclose(load(run).predict(crystals), p, atol=1e-4)
    for target, word in (("always", "are 1"), ("three", "are 0, 1, 2")):
        code, _, err = call("finetune", *job, f"run_dir={tmp_path}/no", f"target={target}")
        assert code == 2 and word in err
    code, _, err = call("finetune", *job, f"run_dir={tmp_path}/no", "finetune.head=diffusion")
    assert code == 2 and "does not classify" in err


def test_a_size_of_cells_is_learned_and_judged_alone(data, call, tmp_path):
    run = tmp_path / "small"
    job = [*FINETUNE, f"data={data}", "target=density", "finetune.epochs=1"]
    code, _, err = call("finetune", *job, f"run_dir={run}", "atoms=[1,4]")
    assert code == 0, err
    dataset = Dataset.open(data)
    items = {s: dataset.split_items(s) for s in ("train", "val", "test")}
    small = {s: int((dataset.atoms[i] <= 4).sum()) for s, i in items.items()}
    assert 0 < small["test"] < len(items["test"])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["labels"] == small["train"]
    assert [metrics[s]["n"] for s in ("val", "test")] == [small["val"], small["test"]]
    code, _, err = call("finetune", *job, f"run_dir={tmp_path}/none", "atoms=[500,900]")
    assert code == 2 and "no crystal of the 'train' split has 500 to 900 atoms" in err
    code, _, err = call("finetune", *job, f"run_dir={tmp_path}/none", "atoms=[5,4]")
    assert code == 2 and "atoms must be [least, most]" in err
    code, _, err = call("finetune", *job, f"run_dir={run}", "atoms=[1,5]")
    assert code == 2 and "holds a run with another" in err


def test_a_linear_probe_moves_one_layer_only(runs, data, call, tmp_path):
    run = tmp_path / "probe"
    code, _, err = call(
        "finetune", *FINETUNE, f"data={data}", f"init_from={runs / 'pre'}", f"run_dir={run}",
        "target=density", "finetune.head=linear", "finetune.freeze_encoder=true",
    )  # fmt: skip
    assert code == 0, err
    before = load_tensors(runs / "pre" / "joint" / "model.safetensors")
    after = load_tensors(run / "finetune" / "model.safetensors")
    for name, tensor in after.items():
        if name.startswith("encoder."):
            assert torch.equal(tensor, before[name]), name
    assert {n for n in after if n.startswith("readout.")} == {
        "readout.out.weight",
        "readout.out.bias",
    }


def test_training_ends_when_nothing_gets_better_and_stays_ended(
    data,
    call,
    tmp_path,
    monkeypatch,
):
    run = tmp_path / "early"
    args = [
        *FINETUNE, f"data={data}", f"run_dir={run}", "init_from=none", "target=density",
        "finetune.epochs=200", "finetune.patience=2", "finetune.lr=0.0000001",
        "finetune.pct_start=0.001", "trainer.validate_every=1",
    ]  # fmt: skip
    with monkeypatch.context() as patch:  # dies after the last save, before the stage is finished
        patch.setattr(RunDirectory, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call("finetune", *args)
    values = [value for _, value in read_metrics(run, "finetune")["val/mae/density"]]
    best = int(np.argmin(values))
    assert len(values) == best + 1 + 2 < 200
    steps = json.loads((run / "metrics.json").read_text())["steps"]
    weights = (run / "finetune" / "model.safetensors").read_bytes()

    code, _, err = call("finetune", *args)
    assert code == 0, err
    assert json.loads((run / "metrics.json").read_text())["steps"] == steps
    assert len(read_metrics(run, "finetune")["val/mae/density"]) == len(values)
    assert (run / "finetune" / "model.safetensors").read_bytes() == weights


def test_a_finetuned_model_is_tried_on_other_data_as_it_is(
    runs,
    data,
    call,
    tmp_path,
):
    run = tmp_path / "zero-shot"
    args = [
        *FINETUNE[:1], "loader.workers=0", f"data={data}", f"init_from={runs / 'fine'}",
        "init_head=true", "finetune.epochs=0", f"run_dir={run}",
    ]  # fmt: skip
    learned = json.loads((runs / "fine" / "metrics.json").read_text())
    code, out, err = call("finetune", *args, f"target={learned['targets'][0]}")
    assert code == 0, err
    found = json.loads((run / "metrics.json").read_text())
    assert found["test"] == pytest.approx(learned["test"], rel=1e-5)
    assert (found["steps"], found["labels"]) == (0, 0)
    assert "as it is" in out
    code, _, err = call("finetune", *args, "targets=[density,ewald_energy]", "resume=never")
    assert code == 2 and "not finetuned on as many targets" in err


def test_a_head_that_learned_another_unit_is_refused(runs, data):
    dataset = Dataset.open(data)
    learned = json.loads((runs / "fine" / "metrics.json").read_text())["targets"]
    config = FinetuneJob(
        data="data/other", targets=learned, init_from=str(runs / "fine"), init_head=True
    )
    stage, _ = jobs.finetune_stage(config, dataset, np.empty(0, np.int64))
    assert stage.targets == tuple(learned)
    known = dataset.manifest.targets
    known[learned[0]] = replace(known[learned[0]], unit="kg/m^3")
    with pytest.raises(ValueError, match=r"predicts in g/cm\^3, but density .* is in kg/m\^3"):
        jobs.finetune_stage(config, dataset, np.empty(0, np.int64))


@pytest.mark.parametrize(
    ("targets", "monitor"),
    [
        ("target=density", "mae/density"),
        ("targets=[density]", "mae/density"),
        ("targets=[density,ewald_energy]", "mse"),
    ],
)
def test_the_best_weights_are_those_of_the_least_validation_mae(
    data, call, tmp_path, monkeypatch, targets, monitor
):
    def fit(session):
        raise ValueError(session.monitor)

    monkeypatch.setattr(finetune, "fit", fit)
    args = [f"data={data}", f"run_dir={tmp_path / 'run'}", "init_from=none", targets]
    code, _, err = call("finetune", *FINETUNE, *args)
    assert code == 2 and err.splitlines()[-1] == f"error: {monitor}"


def test_every_target_needs_a_label_in_every_split():
    labels = {"a": np.array([1.0, np.nan, 2.0, np.nan]), "b": np.array([1.0, 3.0, np.nan, np.nan])}
    splits = {"train": np.arange(4), "test": np.array([2, 3]), "val": np.arange(0)}
    dataset = SimpleNamespace(split_items=splits.get, targets_of=labels.get)
    assert with_label(dataset, "train", ["a", "b"]).tolist() == [0, 1, 2]
    assert with_label(dataset, "val", ["a", "b"]).tolist() == []
    words = r"the 'test' split has a label for b: prepare .*labels=TABLE"
    with pytest.raises(ValueError, match=words):
        with_label(dataset, "test", ["a", "b"])


def test_a_batch_that_fills_a_step_is_not_predicted(random_crystal):
    encoder = build_encoder({"name": "pddformer", "tiny": True})
    stage = FinetuneStage(FinetuneConfig(), encoder, ["gap"], [0.0], [1.0])
    rng = np.random.default_rng(0)
    batch = build([random_crystal(rng, 3, "x")], encoder.graph, ["gap"])
    device = torch.device("cpu")
    found = reports.predictions(stage, iter([batch, replace(batch, is_dummy=True)]), device)
    assert [len(column) for column in found] == [1, 1, 1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["finetune.epochs=0"], "give init_head=true"),
        (["init_head=true"], "needs init_from=RUN"),
        (["finetune.patience=-1"], "must not be negative"),
    ],
)
def test_settings_that_do_not_go_together(data, call, tmp_path, args, words):
    base = [*FINETUNE[:1], f"data={data}", "target=density", f"run_dir={tmp_path / 'run'}"]
    code, _, err = call("finetune", *base, *args)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
