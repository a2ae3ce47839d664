"""Which weights a pretraining stage hands on: the last, or the best by validation."""

from __future__ import annotations

import torch

from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.logger import read_metrics
from crysforge.trainer.runs.model_directory import open_model
from tests.launching import PRETRAIN


def weights(run, stage):
    return open_model(run, stage).weights()


def test_the_best_of_both_stages_are_handed_on(call, data, tmp_path):
    """A rate that is far too high at its peak, so that the last weights need not be the best; every
    step is validated and saved."""
    job = [*PRETRAIN, f"data={data}", "trainer.validate_every=0.01", "trainer.milestone_every=1",
           "vae.lr=0.3", "joint.lr=0.03", "vae.max_steps=6", "joint.max_steps=6",
           "vae.keep_weights=best", "joint.keep_weights=best"]  # fmt: skip
    for metric, name in (("loss", "loss"), ("robust", "robust_loss")):
        run = tmp_path / metric
        code, _, err = call("pretrain", *job, f"joint.best_metric={metric}", f"run_dir={run}")
        assert code == 0, err
        for stage, monitor in (("vae", "loss"), ("joint", name)):
            values = dict(read_metrics(run, stage)[f"val/{monitor}"])
            assert len(values) == 6
            best = min(values, key=values.get)
            kept = weights(run, stage)
            tags = RunDirectory(run).tags(stage)
            assert len(tags) == 6
            for path in tags:
                saved = RunDirectory(run).load(path)
                same = all(torch.equal(v, kept[k]) for k, v in saved.model.items())
                assert same == (saved.step == best), (stage, saved.step, values)
    steps = {m: dict(read_metrics(tmp_path / m, "joint")["val/loss"]) for m in ("loss", "robust")}
    assert steps["loss"] == steps["robust"]  # the same training, but for what is kept


def test_the_last_are_handed_on_otherwise(call, data, tmp_path):
    job = [*PRETRAIN, f"data={data}", "stages=[vae]", "vae.lr=1", f"run_dir={tmp_path}/run"]
    code, _, err = call("pretrain", *job, "trainer.milestone_every=3")
    assert code == 0, err
    newest = RunDirectory(tmp_path / "run").latest("vae")
    kept = weights(tmp_path / "run", "vae")
    assert newest.step == 3 and all(torch.equal(v, kept[k]) for k, v in newest.model.items())


def test_the_best_need_crystals_to_validate_on(call, data, tmp_path, monkeypatch):
    job = [*PRETRAIN, f"data={data}", "vae.keep_weights=best", f"run_dir={tmp_path}/run"]
    monkeypatch.setattr(
        "crysforge.datapipe.storage.dataset.Dataset.split_items",
        lambda self, name: range(9) if name == "train" else [],
    )
    code, _, err = call("pretrain", *job)
    assert code == 2 and "no crystals in its 'val' split" in err
