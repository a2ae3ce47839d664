"""Every registered encoder goes through the whole path: both stages of CrysLDNet, then finetuning
from what they learned, then prediction. The launch scripts run in this process, which costs their
import once."""

from __future__ import annotations

import copy
import csv
import importlib
import math
import signal
import sys
from pathlib import Path

import pytest
import torch

from crysforge.models.encoders import ENCODERS, build_encoder
from crysforge.trainer.base.signals import SIGNALS
from crysforge.trainer.jobs import starting
from crysforge.trainer.runs.model_directory import open_model, take_encoder
from tests import plugin
from tests.distributed.jobs import curve

pytestmark = pytest.mark.distributed

STEPS = {"vae": 20, "joint": 30, "finetune": 30}
EPOCH = 10
RATE = 3e-3
LOSSES = {"vae": ("val/loss", 1), "joint": ("val/flow", 1), "finetune": ("train/loss", EPOCH)}
"""What falls from its first values to its last. In validation a crystal has the same draws each
time; with few labels that is no measure of finetuning, which is seen from epoch to epoch."""


def settings(*stages: str) -> list[str]:
    """No decay, so that only a gradient moves a weight."""
    own = [
        f"{stage}.{setting}"
        for stage in stages
        for setting in (
            f"max_steps={STEPS[stage]}",
            f"lr={RATE}",
            "batch_size=16",
            "weight_decay=0",
            "pct_start=0.1",
        )
    ]
    return [*own, "trainer.log_every=1", "trainer.validate_every=0.4", "loader.workers=0"]


FLOW = ["joint.dit={width: 32, layers: 1, heads: 2}", "joint.latent_norm=true"]
"""Latents of a fixed size, so that what falls is the error and not what it is measured on."""


@pytest.fixture
def launched(monkeypatch):
    """Runs a launch script in this process."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def launched(script: str, *args: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *args])
        importlib.import_module(f"crysforge.launch.{script}").main()

    yield launched
    for number, handler in handlers.items():
        signal.signal(number, handler)


def assert_falls(run: Path, stage: str) -> None:
    training = curve(run, stage)
    assert [step for step, _ in training] == list(range(1, STEPS[stage] + 1))
    name, window = LOSSES[stage]
    values = [value for _, value in curve(run, stage, name)]
    assert all(math.isfinite(value) for value in (*values, *(loss for _, loss in training)))
    assert len(values) > window
    assert sum(values[-window:]) < sum(values[:window]), values


def assert_every_parameter_moved(before: torch.nn.Module, after: torch.nn.Module) -> None:
    for (name, old), (_, new) in zip(
        before.named_parameters(), after.named_parameters(), strict=True
    ):
        assert torch.isfinite(new).all(), name
        assert not torch.equal(old, new), f"no gradient reached {name}"


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """Another project's encoder beside ours."""
    site = tmp_path / "site"
    site.mkdir()
    with plugin.installed(site, monkeypatch):
        yield


@pytest.mark.parametrize("name", [*ENCODERS, "filternet"])
def test_pretrained_finetuned_predicted(name, data, tmp_path, launched, monkeypatch):
    encoder = [f"encoder.name={name}", "encoder.tiny=true"]
    pre, fine, csv_path = tmp_path / "pre", tmp_path / "fine", tmp_path / "predictions.csv"

    launched(
        "pretrain", *encoder, *settings("vae", "joint"), *FLOW, f"data={data}", f"run_dir={pre}"
    )
    starting.seed_everything(0, "encoder")
    fresh = build_encoder({"name": name, "tiny": True})
    of_vae, of_joint = (open_model(pre, stage).build_encoder() for stage in ("vae", "joint"))
    assert_every_parameter_moved(fresh, of_vae)
    assert_every_parameter_moved(of_vae, of_joint)
    assert_falls(pre, "vae")
    assert_falls(pre, "joint")

    taken = []

    def spied(*args):
        taken.append(take_encoder(*args))
        return copy.deepcopy(taken[-1])

    monkeypatch.setattr(starting, "take_encoder", spied)
    job = [f"init_from={pre}", "target=density", f"data={data}", f"run_dir={fine}"]
    launched("finetune", *encoder, *settings("finetune"), *job)
    weights = of_joint.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in taken[0].state_dict().items())
    assert_every_parameter_moved(of_joint, open_model(fine).build_encoder())
    assert_falls(fine, "finetune")

    launched("predict", f"checkpoint={fine}", f"input={data}", f"output={csv_path}")
    with csv_path.open() as file:
        predictions = [float(row["prediction"]) for row in csv.DictReader(file)]
    assert len(predictions) == 200
    assert all(map(math.isfinite, predictions))
    assert len(set(predictions)) > 100
