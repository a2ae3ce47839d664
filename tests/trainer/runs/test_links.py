"""Links that somebody put into a run lead nowhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from crysforge.trainer.base.distributed import World
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.logger import Logger
from crysforge.trainer.runs.saved import Checkpoint

RUN = Path(__file__).resolve().parents[2] / "data" / "schema-1" / "run"


def test_a_continued_run_does_not_reach_out_by_links(tmp_path):
    mine = tmp_path / "mine"
    (mine / "vae-00000007").mkdir(parents=True)
    (mine / "notes.tmp").write_text("mine")
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(mine)
    identity = json.loads((RUN / "run.json").read_text())["identity"]
    with pytest.raises(ValueError, match=r"run/checkpoints is a symbolic link out of"):
        RunDirectory(run).start("a: 1\n", identity, "auto")
    assert sorted(p.name for p in mine.iterdir()) == ["notes.tmp", "vae-00000007"]
    (run / "checkpoints").unlink()
    (tmp_path / "linked").symlink_to(run)  # the run itself may be reached by a link
    RunDirectory(tmp_path / "linked").start("a: 1\n", identity, "auto")


FILES = [
    "config.yaml", "run.json", "owner.json", "heartbeat.json", "metrics.jsonl",
    "events/rank-0000.jsonl", "checkpoints/vae-00000001/state.json",
    "checkpoints/vae-00000001/config.yaml", "checkpoints/vae-00000001/COMPLETE",
    "checkpoints/vae-00000001/model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_linked_file_is_neither_read_nor_written(name, tmp_path):
    """Whoever continues a stranger's run and gives it away gives nothing else away."""
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    identity = json.loads((run / "run.json").read_text())["identity"]
    secret = tmp_path / "secret"
    (run / name).parent.mkdir(exist_ok=True)
    if (run / name).is_file():  # so that it could be used, were it not for the link
        shutil.copy(run / name, secret)
        (run / name).unlink()
    else:
        secret.write_text('{"event": "mine"}\n')
    content = secret.read_bytes()

    def copies() -> set[Path]:
        files = [p for p in run.rglob("*") if p.is_file() and not p.is_symlink()]
        return {p for p in files if p.read_bytes() == content}

    before, directory, refused = copies(), RunDirectory(run), ""
    (run / name).symlink_to(secret)
    try:
        directory.start(secret.read_text() if name == "config.yaml" else "a: 1\n", identity, "auto")
        directory.latest("vae")
        log = Logger(run, "vae", 1, 9, World(0, 1, 0, device="cpu"))
        log.heartbeat(1)
        log.event("start")
        log.scalars(2, {"x": 1.0})
        log.close()
        directory.save(Checkpoint("vae", 9, {}, {"w": torch.zeros(2)}, {}), keep=2)
    except (OSError, ValueError) as error:
        refused = str(error)
    assert secret.read_bytes() == content and copies() <= before
    assert "\n" not in refused
    assert str(run / name) in refused
