"""One process at a time submits to a folder."""

from __future__ import annotations

import contextlib
import sys

import pytest

from crysforge.launch import submit
from crysforge.launch.cluster.submission import Submission
from tests.launch.cluster.test_submit import FINETUNE, ask


def test_one_submits_to_a_folder_at_a_time(tmp_path, monkeypatch):
    """Two would write over each other which jobs they have. Of who ends nothing is left."""
    monkeypatch.chdir(tmp_path)
    argv = ["submit", *FINETUNE, "run_dir=r/s", "cluster=debug"]
    monkeypatch.setattr(sys, "argv", argv)
    submission = ask(*argv[1:]).submission()
    with submission.alone():
        asked = ask(*argv[1:])
        asked.submission()  # the lock is no reason to take the folder for somebody else's
        with pytest.raises(ValueError, match=r"another submit is at work in .*s\.submit.*process"):
            submit.main()
        assert [p.name for p in submission.folder.iterdir()] == ["lock"]
    assert not submission.folder.exists()


def test_what_was_submitted_meanwhile_is_not_submitted_again(tmp_path, monkeypatch, capsys):
    """The record is read when nobody else writes it."""
    monkeypatch.chdir(tmp_path)
    argv = [*FINETUNE, "run_dir=r/s", "cluster=debug"]
    monkeypatch.setattr(sys, "argv", ["submit", *argv])
    alone = Submission.alone

    @contextlib.contextmanager
    def late(submission):
        """Somebody else was faster."""
        with alone(submission):
            submission.add("s", "r/s", {}, {})
            (tmp_path / "r" / "s").mkdir(parents=True)
            (tmp_path / "r/s/run.json").write_text('{"identity": {}, "finished": ["finetune"]}')
            submission.write()
            yield

    monkeypatch.setattr(Submission, "alone", late)
    submit.main()
    assert "s: finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "part", ["cells", "logs", "events", "events/s", "code-1", "logs/1_0_log.out"]
)
def test_a_folder_with_a_part_elsewhere_is_not_submitted_to(part, tmp_path, monkeypatch, capsys):
    """As may be of somebody else's: nothing is written, or removed, where the link leads."""
    mine = tmp_path / "mine"
    (mine / "launch").mkdir(parents=True)
    (mine / "launch" / "pretrain.py").write_text("mine")
    folder = tmp_path / "r" / "s.submit"
    (folder / part).parent.mkdir(parents=True)
    (folder / part).symlink_to(mine)
    submission = Submission(folder, "finetune")
    submission.add("x", str(tmp_path / "r" / "x"), {}, {}) if part != "cells" else None
    submission.write()
    monkeypatch.setattr(sys, "argv", ["submit", *FINETUNE, f"run_dir={tmp_path}/r/s"])
    with pytest.raises(ValueError, match=f"{part} is a symbolic link out of"):
        submit.main()
    assert [p.relative_to(mine).as_posix() for p in mine.rglob("*")] == [
        "launch", "launch/pretrain.py",
    ]  # fmt: skip
    assert (mine / "launch" / "pretrain.py").read_text() == "mine"
