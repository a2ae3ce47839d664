"""Links that somebody put into a run lead nowhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from crysforge.trainer.runs.checkpoint import RunDirectory

RUN = Path(__file__).resolve().parents[2] / "data" / "schema-1" / "run"


def test_a_continued_run_does_not_reach_out_by_links(tmp_path):
    mine = tmp_path / "mine"
    (mine / "vae-00000007").mkdir(parents=True)
    (mine / "notes.tmp").write_text("mine")
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(mine)
    identity = json.loads((RUN / "run.json").read_text())["identity"]
    with pytest.raises(ValueError, match=r"run/checkpoints is a symbolic link out of the run"):
        RunDirectory(run).start("a: 1\n", identity, "auto")
    assert sorted(p.name for p in mine.iterdir()) == ["notes.tmp", "vae-00000007"]
    (run / "checkpoints").unlink()
    (tmp_path / "linked").symlink_to(run)  # the run itself may be reached by a link
    RunDirectory(tmp_path / "linked").start("a: 1\n", identity, "auto")
