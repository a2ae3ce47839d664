"""When a process is killed, those that worked for it end too, whatever they do or wait for."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import islice

import pytest

from crysforge.datapipe.common.processes import Parent, Process
from crysforge.launch import demo
from tests.families import left_of, living, orphans, parent_of, until
from tests.serving import make_set
from tests.waits import (
    FUNCTIONS,
    WAITS,
    hold_the_interpreter,
    loader,
    loader_orphans,
    worker_orphans,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory, random_crystal):
    return make_set(tmp_path_factory.mktemp("orphans") / "data", random_crystal)


@pytest.mark.parametrize("wait", WAITS, ids=lambda f: f.__name__)
def test_loader_workers(root, tmp_path, wait):
    assert loader_orphans(wait, root, tmp_path) == []


def test_loader_workers_outlive_the_thread_that_started_them(root, tmp_path):
    """For Linux the thread is the parent; not for us."""
    marks = [tmp_path / name for name in ("thread ended", "all read")]
    stream = loader(root, tmp_path)

    def work():
        batches: list = []
        thread = threading.Thread(target=lambda: batches.append(iter(stream)) or next(batches[0]))
        thread.start()
        thread.join()
        marks[0].touch()
        time.sleep(0.5)  # for a signal that must not come
        assert sum(batch.num_crystals for batch in islice(batches[0], 14)) == 56
        marks[1].touch()
        signal.pause()

    with parent_of(work) as parent:
        until(marks[1].exists, "the rest is read")
        assert orphans(parent) == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_workers_of_prepare(function):
    assert worker_orphans(function) == []


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f is not hold_the_interpreter])
def test_workers_that_a_thread_has_started(function):
    """What lets no other thread run only the system can end, and it does so for main threads."""
    assert worker_orphans(function, in_thread=True) == []


def test_a_script_of_the_demo(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)\n"
                      "while True: signal.pause()\n")  # fmt: skip
    with parent_of(lambda: demo.call(str(script.with_suffix("")))) as parent:
        until(parent.children, "it runs")
        assert orphans(parent) == []


def test_a_parent_that_ended_before_the_child_could_ask():
    def work():
        Parent(1 if os.getppid() != 1 else 2, by_main_thread=True).end_with_me()
        signal.pause()

    with parent_of(work) as process:
        assert left_of([process]) == []


def test_a_process_is_told_from_another_with_its_number():
    with parent_of(signal.pause) as process:
        known = Process.from_json(Process.of(process.pid).to_json())
        assert known.alive()
        assert Process(known.host, known.pid, "1", known.space).alive() is False
        assert Process("elsewhere", known.pid, known.started, known.space).alive() is None
        assert Process(known.host, known.pid, known.started, "a container").alive() is None
        process.kill()
        until(lambda: not living([process]), "it has ended")
        assert known.alive() is False
    wrong = ({"pid": "1"}, {"host": "\x1b[31m"}, {"started": 3})
    for nonsense in (None, [], {}, *({**known.to_json(), **one} for one in wrong)):
        with pytest.raises(ValueError, match="no process"):
            Process.from_json(nonsense)
