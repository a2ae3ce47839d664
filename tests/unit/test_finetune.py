"""Ways of finetuning: with a linear head, until nothing gets better, and not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.launching import FINETUNE
from trainer.checkpoint import RunDirectory
from trainer.files import load_tensors
from trainer.logger import read_metrics


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
