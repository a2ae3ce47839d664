"""What earlier releases wrote still works: models predict the same, a stopped run goes on.

tests/data/schema-N was made by tests/data/make.py with the code that wrote schema N. Schema 1 has
the model in the directory of its finetuning run, schema 2 as exported.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from crysforge import load
from crysforge.datapipe.common.files import sha256
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.logger import read_metrics

DATA = Path(__file__).resolve().parents[2] / "data"
MODELS = sorted(DATA.glob("schema-*/model"))
RUNS = sorted(DATA.glob("schema-*/run"))
ENCODER = ["encoder.name=pddformer", "encoder.tiny=true", "encoder.width=8", "encoder.layers=1"]
RUN = [
    *ENCODER, "data=set", "run_dir=run", "stages=[vae]", "vae.batch_size=8", "vae.max_steps=4",
    "trainer.log_every=1", "trainer.keep=1", "loader.workers=0", "trainer.deterministic=true",
]  # fmt: skip
STOPPED = [*RUN, "trainer.walltime_minutes=0"]


def crystals(folder: Path) -> list[Crystal]:
    """Those of the test split."""
    dataset = Dataset.open(folder / "set")
    return [c for _, c in dataset.read(dataset.split_items("test"))]


def call(monkeypatch, folder: Path, script: str, *args: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *args])
    importlib.import_module(f"crysforge.launch.{script}").main()


def test_something_is_kept():
    assert [p.parent.name for p in MODELS] == ["schema-1", "schema-2"]
    assert RUNS
    assert sum(p.stat().st_size for p in DATA.glob("schema-*/**/*") if p.is_file()) < 200_000


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.parent.name)
def test_a_kept_model_predicts_as_it_did(path):
    expected = json.loads((path.parent / "predictions.json").read_text())
    model = load(path)
    assert (model.targets, model.units) == (["density"], ["g/cm^3"])
    np.testing.assert_allclose(model.predict(crystals(DATA / "schema-1")), expected, atol=1e-5)


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.parent.name)
def test_a_kept_model_is_finetuned_and_exported(path, tmp_path, monkeypatch):
    shutil.copytree(DATA / "schema-1" / "set", tmp_path / "set")
    call(
        monkeypatch, tmp_path, "finetune", f"init_from={path}", "target=volume_per_atom",
        "data=set", "run_dir=run", "finetune.max_steps=1", "loader.workers=0",
    )  # fmt: skip
    call(monkeypatch, tmp_path, "export", f"checkpoint={path}", "output=out")
    some = crystals(tmp_path)
    assert (load("out").predict(some) == load(path).predict(some)).all()


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.parent.name)
def test_a_kept_run_goes_on_as_if_never_stopped(path, tmp_path, monkeypatch):
    for place in ("stopped", "whole"):
        shutil.copytree(path.parent / "set", tmp_path / place / "set")
    shutil.copytree(path, tmp_path / "stopped" / "run")
    call(monkeypatch, tmp_path / "stopped", "pretrain", *RUN, "resume=must")
    call(monkeypatch, tmp_path / "whole", "pretrain", *RUN)
    curves = [read_metrics(tmp_path / p / "run", "vae")["train/loss"] for p in ("stopped", "whole")]
    assert [step for step, _ in curves[0]] == [2, 3, 4]
    np.testing.assert_allclose(curves[0], curves[1][1:], rtol=1e-4)
    assert RunDirectory(tmp_path / "stopped" / "run").read()["finished"] == ["vae"]


@pytest.mark.parametrize("key", ["stream", "best", "result", "meter", "skipped", "losses"])
@pytest.mark.parametrize("value", [None, "x", ["x"], {"x": {}}, "missing"])
def test_a_run_with_another_state_is_refused_in_one_line(key, value, tmp_path, monkeypatch):
    shutil.copytree(RUNS[0].parent / "set", tmp_path / "set")
    (saved,) = Path(shutil.copytree(RUNS[0], tmp_path / "run")).glob("checkpoints/*")
    state = json.loads((saved / "state.json").read_text()) | {key: value}
    if value == "missing":
        del state[key]
    (saved / "state.json").write_text(json.dumps(state))
    hashes = json.loads((saved / "COMPLETE").read_text()) | {
        "state.json": sha256(saved / "state.json")
    }
    (saved / "COMPLETE").write_text(json.dumps(hashes))
    with pytest.raises(ValueError, match=r"^(state\.json of )?checkpoint vae-00000001"):
        call(monkeypatch, tmp_path, "pretrain", *RUN)
