"""A small data set, finished runs on it, launch scripts called in this process, and an exploit."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest

from crysforge.datapipe.crystals.prototypes import TARGETS, UNITS, prototypes
from crysforge.datapipe.storage.dataset import DatasetWriter
from crysforge.trainer.base.script import STARTS_ANEW, run
from tests.exploits import Exploit
from tests.launching import FINETUNE, PRETRAIN


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    with DatasetWriter(root, list(TARGETS), units=dict(UNITS)) as writer:
        for i, crystal in enumerate(prototypes(size=200, seed=1)):
            if i < 90:
                writer.add(("train", "train", "train", "val", "test")[i % 5], crystal)
        writer.finish({})
    return root


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a launch script in this process: (exit code, standard output, standard error)."""

    def call(script: str, *args: str) -> tuple[int, str, str]:
        module = importlib.import_module(f"crysforge.launch.{script}")
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        code = 0
        try:
            run(module.main, again=getattr(module, "again", lambda: STARTS_ANEW))
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A finished pretraining and a finished finetuning run."""
    root = tmp_path_factory.mktemp("runs")
    argv = sys.argv
    try:
        for script, *args in (
            ["pretrain", *PRETRAIN, f"data={data}", f"run_dir={root}/pre"],
            ["finetune", *FINETUNE, f"data={data}", f"run_dir={root}/fine",
             f"init_from={root}/pre", "target=density"],
        ):  # fmt: skip
            sys.argv = [script, *args]
            importlib.import_module(f"crysforge.launch.{script}").main()
    finally:
        sys.argv = argv
    return root


@pytest.fixture
def exploit(tmp_path):
    exploit = Exploit(tmp_path / "hacked")
    pickle.loads(pickle.dumps(exploit))  # it does what it should
    exploit.path.rmdir()
    yield exploit
    assert not exploit.path.exists(), "code of the file was run"
