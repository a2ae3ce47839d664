"""Commands write to no place that a link leads to, and through pipes and terminals."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest

from crysforge.datapipe.common.journal import WorkDirectory
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.storage.dataset import DatasetWriter
from crysforge.datapipe.storage.manifest import Manifest
from crysforge.trainer.base.script import run
from tests.launching import FINETUNE

MINE = "my thesis"


# Run directories


def files_of(path: Path) -> list[Path]:
    return [p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file()]


def folders_of(path: Path) -> list[Path]:
    return [p.relative_to(path) for p in sorted(path.iterdir()) if p.is_dir()]


@pytest.mark.parametrize("names", [files_of, folders_of])
def test_links_in_a_run_directory(call, data, runs, tmp_path, names):
    """In the place of everything that a run writes: each is refused by one line, and what it leads
    to is left alone."""
    path, mine = tmp_path / "run", tmp_path / "mine"
    path.mkdir()
    mine.mkdir()
    record = json.loads((runs / "fine" / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**record, "finished": []}))
    links = [path / n for n in names(runs / "fine") if n.name != "run.json"]
    for number, link in enumerate(links):
        link.parent.mkdir(parents=True, exist_ok=True)
        victim = mine / str(number)
        victim.write_text(MINE) if names is files_of else victim.mkdir()
        link.symlink_to(victim)
    refused = []
    for _ in range(len(links) + 1):
        code, _, err = call(
            "finetune", *FINETUNE, f"data={data}", f"run_dir={path}", f"init_from={runs}/pre",
            "target=density",
        )  # fmt: skip
        if code == 0:
            break
        last = err.strip().splitlines()[-1]
        (named,) = [
            link
            for link in links
            if re.search(rf"error: {re.escape(str(link))} is a (symbolic )?link\b", last)
        ]
        refused.append(named)
        named.unlink()
    assert code == 0
    assert len(refused) >= (8 if names is files_of else 4)
    assert (path / "metrics.json").is_file()
    assert {p.read_text() for p in mine.iterdir() if p.is_file()} <= {MINE}
    assert not list(mine.rglob("*/*"))
    assert (path / "heartbeat.json" in refused) == (names is files_of)


def test_a_run_directory_may_be_a_link_itself(call, data, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to("scratch")
    settings = ["init_from=none", "target=density", "finetune.max_steps=1"]
    code, _, err = call("finetune", *FINETUNE, *settings, f"data={data}", f"run_dir={tmp_path}/run")
    assert code == 0, err
    assert (tmp_path / "run").is_symlink() and (tmp_path / "scratch" / "metrics.json").is_file()


# predict


@pytest.fixture
def predict(data, runs, monkeypatch, capfd):
    """Runs the command with an output: (exit code, standard output, standard error)."""

    def predict(output, *args, source=None) -> tuple[int, str, str]:
        argv = [f"checkpoint={runs}/fine", f"input={source or data}", f"output={output}", *args]
        monkeypatch.setattr(sys, "argv", ["predict", *argv])
        code = 0
        try:
            run(importlib.import_module("crysforge.launch.predict").main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    return predict


def test_predictions_go_to_standard_output(predict):
    code, out, err = predict("/dev/stdout")
    assert code == 0
    assert out.splitlines()[0] == "id,prediction" and len(out.splitlines()) == 91
    assert "90 predictions of density" in err
    assert not Path("/dev/stdout.dropped.csv").exists()


def test_predictions_go_through_a_pipe(predict, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "crystals").mkdir()
    (tmp_path / "crystals" / "bad.cif").write_text("nonsense")
    good = "NaCl\n1\n4 0 0\n0 4 0\n0 0 4\nNa Cl\n1 1\ndirect\n0 0 0\n.5 .5 .5\n"
    (tmp_path / "crystals" / "good.vasp").write_text(good)
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    code, _, err = predict(tmp_path / "pipe", source=tmp_path / "crystals")
    reader.join(60)
    assert code == 0
    assert [line.split(",")[0] for line in found[0].splitlines()] == ["id", "good"]
    assert "\nbad," in err and "1 crystals could not be used" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["crystals", "pipe"]


@pytest.mark.parametrize("name", ["out.csv", "out.dropped.csv"])
def test_predictions_do_not_follow_links(predict, tmp_path, name):
    (tmp_path / "mine").write_text(MINE)
    (tmp_path / name).symlink_to("mine")
    code, _, err = predict(tmp_path / "out.csv", "overwrite=true")
    assert code == 2
    assert f"error: {tmp_path / name} is a symbolic link and is not replaced" in err
    assert (tmp_path / "mine").read_text() == MINE
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["mine", name])


# prepare


def test_histograms_do_not_follow_links(call, data, tmp_path):
    """Into a data set of somebody else."""
    for path in data.iterdir():
        os.link(path, tmp_path / path.name)
    (tmp_path / "mine").write_text(MINE)
    (tmp_path / "histograms.png").symlink_to("mine")
    code, _, err = call("prepare", f"inspect={tmp_path}")
    assert code == 2 and "histograms.png is a symbolic link and is not replaced" in err
    assert (tmp_path / "mine").read_text() == MINE


@pytest.mark.parametrize("purpose", ["partial", "dedup"])
def test_work_directories_are_no_links(tmp_path, purpose):
    """What lies in them is removed."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text(MINE)
    (tmp_path / f".out.{purpose}").symlink_to("thesis")
    with pytest.raises(OSError, match=f"out.{purpose} is a symbolic link"):
        if purpose == "partial":
            DatasetWriter(tmp_path / "out", [])
        else:
            WorkDirectory(tmp_path / "out", purpose, {}).__enter__()
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter"]


def test_a_data_set_may_be_made_where_a_link_leads(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to("scratch")
    asked = PrepareConfig(input="prototypes", size=200, output=str(tmp_path / "out"), workers=1)
    prepare(asked)
    assert (tmp_path / "out").is_symlink()
    assert sum(Manifest.load(tmp_path / "scratch").splits.values()) == 200
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "scratch"]
