"""When a process is killed, those that worked for it end too, whatever they do or wait for."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import threading
import time
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from crysforge.datapipe.common.processes import Parent, Process
from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.loading.stream import LoaderConfig, Stream
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage import remote as source
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import Manifest
from crysforge.launch import demo
from tests.families import left_of, living, orphans, parent_of, until
from tests.serving import SHARDS, make_set, serve


@pytest.fixture(scope="module")
def root(tmp_path_factory, random_crystal):
    return make_set(tmp_path_factory.mktemp("orphans") / "data", random_crystal)


def hold_the_interpreter(*_):
    """Waits for ever in a way that lets no other thread of the process run."""
    ctypes.PyDLL(None).pause()


def hold_and_mark(folder, sample, rng):
    (folder / f"held-{os.getpid()}").touch()
    hold_the_interpreter()


def loader(where, cache, **more):
    """A stream whose two workers read shard by shard."""
    config = LoaderConfig(workers=2, shuffle=12, cache_dir=str(cache), tries=3)
    return Stream(
        Dataset.open(where), "train", GraphSpec(neighbors=4), config, batch_size=4, **more
    )


def take_one_and_wait(stream, mark):
    next(iter(stream))
    mark.touch()
    signal.pause()


# What a loader worker may wait for


def in_the_queue(root, tmp_path, server):
    mark = tmp_path / "one taken"
    return lambda: take_one_and_wait(loader(root, tmp_path), mark), lambda _: mark.exists()


def in_a_transform(root, tmp_path, server):
    stream = loader(root, tmp_path, transform=partial(hold_and_mark, tmp_path))
    return lambda: next(iter(stream)), lambda _: len(list(tmp_path.glob("held-*"))) == 2


def in_a_remote_read(root, tmp_path, server):
    server.faults = {name: ["stall"] * 9 for name in SHARDS}
    stream = loader(server.url, tmp_path)
    return lambda: next(iter(stream)), lambda family: server.stalled.is_set()


def before_another_try(root, tmp_path, server):
    server.faults = {name: [500] * 9 for name in SHARDS}
    stream = loader(server.url, tmp_path)

    def work():
        source.FIRST_WAIT = 1000.0
        next(iter(stream))

    return work, lambda family: sum(server.asked[name] for name in SHARDS) >= 2


def for_a_lock(root, tmp_path, server):
    for shard in Manifest.load(root).shards:  # held as by a download of another process
        file = open(tmp_path / f"{shard.bytes}-{shard.sha256}.partial", "ab")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        server.held.append(file)
    stream = loader(root, tmp_path)
    return lambda: next(iter(stream)), lambda family: all(_has_open(p, ".partial") for p in family)


def for_a_command(root, tmp_path, server):
    script = tmp_path / "slow.sh"
    script.write_text(f'case $1 in *.tar) sleep 1000 | sleep 1000;; esac; cat "{root}/$1"')
    stream = loader(f"pipe:sh {script} {{}}", tmp_path / "cache")
    return lambda: next(iter(stream)), lambda family: [p.name() for p in family].count("sleep") == 4


def stopped(root, tmp_path, server):
    mark = tmp_path / "one taken"

    def ready(family):
        if mark.exists():
            for process in family:
                process.suspend()
        return mark.exists()

    return lambda: take_one_and_wait(loader(root, tmp_path), mark), ready


def _has_open(process, suffix):
    folder = Path(f"/proc/{process.pid}/fd")
    return any(os.readlink(link).endswith(suffix) for link in folder.iterdir() if link.is_symlink())


WAITS = [
    in_the_queue, in_a_transform, in_a_remote_read, before_another_try, for_a_lock, for_a_command,
    stopped,
]  # fmt: skip


@pytest.mark.parametrize("wait", WAITS, ids=lambda f: f.__name__)
def test_loader_workers(root, tmp_path, wait):
    with serve(root) as server:
        server.held = []
        work, ready = wait(root, tmp_path, server)
        with parent_of(work) as parent:
            until(lambda: len(parent.children()) == 2, "there are workers")
            until(lambda: ready(parent.children(recursive=True)), f"they wait {wait.__name__}")
            assert orphans(parent) == []


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


# Workers of prepare, dedup, verify, bake


def sleeps(item):
    time.sleep(1000)


def answers_at_length(item):
    return bytes(1 << 24)


@pytest.mark.parametrize("function", [len, sleeps, hold_the_interpreter, answers_at_length])
@pytest.mark.parametrize("thread", [False, True])
def test_workers(function, thread):
    """Idle, asleep, busy, or waiting for somebody to take an answer."""
    if thread and function is hold_the_interpreter:
        return  # only the system could end it, and it does that for main threads alone

    def work():
        with Workers(function, 3) as workers:
            if function is not len:
                for worker in range(3):
                    workers._give(worker, iter(["x"]), 1)
            time.sleep(1000)

    def begin():
        thread_of = threading.Thread(target=work)
        thread_of.start()
        thread_of.join()

    with parent_of(begin if thread else work) as parent:
        family = until(lambda: len(parent.children()) == 3 and parent.children(), "they work")
        until(lambda: all(_asleep_at_all(p) for p in family), "they wait")
        assert orphans(parent) == []


def _asleep_at_all(process):
    return process.status() == "sleeping"


# Others


def test_a_script_of_the_demo(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)\n"
                      "while True: signal.pause()\n")  # fmt: skip
    with parent_of(lambda: demo.call(str(script))) as parent:
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
    for nonsense in (None, [], {}, {**known.to_json(), "pid": "1"}):
        with pytest.raises(ValueError, match="no process"):
            Process.from_json(nonsense)
