"""A job whose other processes are gone says so in one line, wherever it notices."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from crysforge.trainer.base.distributed import lost_process
from crysforge.trainer.base.script import run
from crysforge.trainer.base.signals import REQUEUE, Requeue


class Fatal(Dataset):
    """Its worker ends as one does that the system has killed."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)


def killed_worker():
    list(DataLoader(Fatal(), num_workers=1))


def lost_rank():
    raise RuntimeError("[third_party/gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:4242\n")


@pytest.mark.parametrize(
    ("main", "words"),
    [(killed_worker, "rank 0 lost a loader worker"), (lost_rank, "rank 0 lost the other ranks")],
)
def test_one_line_and_a_code_that_may_be_tried_again(main, words, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}") and "the same command continues" in line


def test_other_errors_are_bugs_and_keep_their_traceback():
    assert lost_process(RuntimeError("shape mismatch"), 0) is None
    assert lost_process(RuntimeError(), 0) is None

    def main():
        torch.zeros(2) @ torch.zeros(3)

    with pytest.raises(RuntimeError):
        run(main)


@pytest.mark.parametrize(
    ("error", "ends", "code"),
    [
        (None, [(None, 0)], 0),
        (ValueError("wrong"), [("wrong", 2), (None, 0)], 2),
        (TimeoutError("late"), [("late", 1), (None, 0)], 1),
        (TypeError("a bug"), [("a bug", 1), (None, 0)], None),
        (Requeue(), [(None, 0)], REQUEUE),
        (KeyboardInterrupt(), [(None, 0)], 130),
    ],
)
def test_whoever_wants_to_know_hears_how_a_script_ends(error, ends, code):
    def main():
        if error is not None:
            raise error

    heard = []

    def ended(reason, code):
        heard.append((None if reason is None else str(reason), code))

    try:
        run(main, ended)
        found = 0
    except SystemExit as end:
        found = end.code
    except TypeError:
        found = None
    assert (heard, found) == (ends, code)
