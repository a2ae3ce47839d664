"""Ctrl-C and a scheduler's signals end every script with one line that says what the same command
does then, and with the documented exit code; nothing half is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from crysforge.datapipe.preparing.splitting import clusters
from crysforge.trainer.base.script import CONTINUES, STARTS_ANEW
from crysforge.trainer.base.signals import SIGNALS, StopRequest
from crysforge.trainer.reports import report
from crysforge.trainer.serving.predictor import Predictor
from tests.families import living, until
from tests.launching import FINETUNE, PRETRAIN

ROOT = Path(__file__).resolve().parents[2]
CODES = {"SIGINT": 130, "SIGTERM": 75, "SIGUSR1": 75, "SIGUSR2": 75}


@pytest.fixture(autouse=True)
def handlers():
    """Puts back the signal handlers of the test process, of which a job in the background of a
    shell ignores Ctrl-C."""
    old = {s: signal.getsignal(s) for s in (*SIGNALS, signal.SIGINT)}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for number, handler in old.items():
        signal.signal(number, handler)


def send(name: str):
    def kill(*args, **kwargs):
        os.kill(os.getpid(), getattr(signal, name))
        pytest.fail("the signal was not heard")

    return kill


def ended(name: str, code: int, err: str, words: str) -> bool:
    how = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    last = err.strip().splitlines()[-1]
    return code == CODES[name] and last == f"{how}: {words}" and "Traceback" not in err


@pytest.mark.parametrize("name", CODES)
def test_prepare_leaves_nothing(name, tmp_path):
    """A process with workers of its own, met in the middle of its work."""
    args = ["input=prototypes", "size=20000", f"output={tmp_path}/out", "workers=2"]
    command = [sys.executable, ROOT / "launch" / "prepare.py", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(
            lambda: (
                process.poll() is not None or any((tmp_path / ".out.partial").glob("train-*.tar"))
            ),
            "it writes",
        )
        assert process.poll() is None
        workers = psutil.Process(process.pid).children()
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
    assert ended(name, process.returncode, err, STARTS_ANEW), err
    assert list(tmp_path.iterdir()) == []
    assert len(workers) == 2 and not living(workers)


def test_prepare_says_that_it_goes_on_where_it_does(call, data, tmp_path, monkeypatch):
    args = [f"input={data}", f"output={tmp_path}/out", "split=group", "split_by=cluster"]
    args += ["workers=1", "progress=false"]
    monkeypatch.setattr(clusters.Link, "__call__", send("SIGTERM"))
    code, _, err = call("prepare", *args)
    assert ended("SIGTERM", code, err, CONTINUES), err
    assert [p.name for p in tmp_path.iterdir()] == [".out.groups"]
    monkeypatch.undo()
    code, _, err = call("prepare", *args)
    assert code == 0 and [p.name for p in tmp_path.iterdir()] == ["out"], err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_predict_leaves_nothing(name, call, runs, data, tmp_path, monkeypatch):
    args = [f"checkpoint={runs}/fine", f"input={data}", f"output={tmp_path}/out.csv", "workers=1"]
    monkeypatch.setattr(Predictor, "_pack", send(name))
    code, _, err = call("predict", *args)
    assert ended(name, code, err, STARTS_ANEW), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_evaluate_leaves_nothing(name, call, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "gather", send(name))
    code, _, err = call("evaluate", f"suite={runs}", f"output={tmp_path}/report")
    assert ended(name, code, err, STARTS_ANEW), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_training_saves_and_goes_on(script, name, call, data, tmp_path, monkeypatch):
    """Of a run that is met in a step, no step is lost."""
    settings = {"pretrain": PRETRAIN, "finetune": [*FINETUNE, "target=density"]}[script]
    args = [*settings, f"data={data}", f"run_dir={tmp_path}/run"]
    real, steps = StopRequest.wanted, []

    def wanted(self):
        steps.append(self)
        if len(steps) == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return real(self)

    monkeypatch.setattr(StopRequest, "wanted", wanted)
    code, out, err = call(script, *args)
    assert code == CODES[name] and "Traceback" not in err, err
    assert out.count(f"({name}); the same command continues") == 1
    assert "stopped after step 2 of" in out
    code, out, err = call(script, *args)
    assert code == 0 and "continuing after step 2 of" in out, err


def test_a_second_ctrl_c_ends_training_at_once(call, data, tmp_path, monkeypatch):
    def wanted(self):
        os.kill(os.getpid(), signal.SIGINT)
        send("SIGINT")()

    monkeypatch.setattr(StopRequest, "wanted", wanted)
    args = [*FINETUNE, f"data={data}", f"run_dir={tmp_path}/run", "target=density"]
    code, _, err = call("finetune", *args)
    assert ended("SIGINT", code, err, CONTINUES), err
    monkeypatch.undo()
    assert call("finetune", *args)[0] == 0


def test_ctrl_c_outside_of_training(call, data, tmp_path, monkeypatch):
    monkeypatch.setattr("crysforge.trainer.jobs.finetuning.finetuned", send("SIGINT"))
    args = [*FINETUNE, f"data={data}", f"run_dir={tmp_path}/run", "target=density"]
    code, _, err = call("finetune", *args)
    assert ended("SIGINT", code, err, CONTINUES), err
    monkeypatch.undo()
    code, out, _ = call("finetune", *args)
    assert code == 0 and "test MAE of density" in out
