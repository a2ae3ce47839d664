"""What workers may be doing when their parent is killed, and how many of them outlive it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.graphs.transforms import Step
from crysforge.datapipe.loading.stream import LoaderConfig, Stream
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage import remote as source
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import Manifest
from tests.families import orphans, parent_of, until
from tests.serving import SHARDS, serve


def hold_the_interpreter(*_):
    """Waits for ever in a way that lets no other thread of the process run."""
    ctypes.PyDLL(None).pause()


@dataclass(frozen=True)
class HoldAndMark(Step):
    folder: Path

    def on_crystal(self, sample, rng):
        (self.folder / f"held-{os.getpid()}").touch()
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
    stream = loader(root, tmp_path, transform=HoldAndMark(tmp_path))
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


def loader_orphans(wait: Callable, root: Path, folder: Path) -> list[psutil.Process]:
    """What is left of two loader workers of a data set that wait so, when their parent is killed.
    The folder is for what that takes."""
    with serve(root) as server:
        server.held = []
        work, ready = wait(root, folder, server)
        with parent_of(work) as parent:
            until(lambda: len(parent.children()) == 2, "there are workers")
            until(lambda: ready(parent.children(recursive=True)), f"they wait {wait.__name__}")
            return orphans(parent)


# What those of prepare, dedup, verify and bake may do


def sleeps(item):
    time.sleep(1000)


def answers_at_length(item):
    return bytes(1 << 24)


FUNCTIONS = [len, sleeps, hold_the_interpreter, answers_at_length]
"""Idle, asleep, busy, and waiting for somebody to take an answer."""


def worker_orphans(function: Callable, in_thread: bool = False) -> list[psutil.Process]:
    """What is left of three `Workers` at a function, when their parent is killed."""

    def work():
        with Workers(function, 3) as workers:
            if function is not len:
                for worker in range(3):
                    workers._give(worker, ["x"])
            time.sleep(1000)

    def begin():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with parent_of(begin if in_thread else work) as parent:
        until(lambda: len(parent.children()) == 3, "they work")
        family = parent.children()
        until(lambda: all(p.status() == psutil.STATUS_SLEEPING for p in family), "they wait")
        return orphans(parent)
