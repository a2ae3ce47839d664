"""Faults while a data set is written: never half of it taken for whole."""

import builtins
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest

from crysforge.datapipe.common import files
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.storage import writer as writing
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import Manifest
from tests.damage import COUNT, lost, write

FORK = multiprocessing.get_context("fork")


# Writing


def attempt(root, crystals, results):
    try:
        write(root, crystals, shard_size=4)
        results.put("written")
    except ValueError as error:
        results.put(str(error))


def test_of_writers_at_once_one_wins_20_times(tmp_path, crystals):
    for number in range(20):
        root, results = tmp_path / str(number), FORK.Queue()
        args = (root, crystals, results)
        processes = [FORK.Process(target=attempt, args=args) for _ in range(3)]
        for process in processes:
            process.start()
        said = [results.get(timeout=100) for _ in processes]
        for process in processes:
            process.join()
        assert said.count("written") == 1
        assert all(
            "another process is writing" in s or "already holds a data set" in s
            for s in said
            if s != "written"
        )
        assert lost(Dataset.open(root), crystals, range(COUNT)) == []
    assert len(list(tmp_path.iterdir())) == 20


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives an empty disk of so many kilobytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(kilobytes):
        unmount()
        options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)]
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
        return place

    def unmount():
        if os.path.ismount(place):
            subprocess.run(["umount", str(place)], check=True)

    if shutil.which("mount") is None or os.getuid() != 0:
        pytest.skip("only root can mount a small disk")
    yield make
    unmount()


def test_a_full_disk_leaves_nothing_or_all(small_disk, crystals):
    outcomes = set()
    for kilobytes in range(8, 240, 16):
        disk = small_disk(kilobytes)
        try:
            write(disk / "d", crystals)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert str(disk) in str(error)
            assert list(disk.iterdir()) == []
            outcomes.add("nothing")
        else:
            assert lost(Dataset.open(disk / "d"), crystals, range(COUNT)) == []
            outcomes.add("all")
    assert outcomes == {"nothing", "all"}


class FullDisk:
    """`open` for a disk that has room for so many bytes."""

    def __init__(self, room):
        self.room = room

    def open(self, path, mode="r", **options):
        file = builtins.open(path, mode, **options)  # noqa: SIM115  (it is what we return)
        if "w" in mode or "x" in mode:
            write, disk = file.write, self

            class Limited:
                def __getattr__(self, name):
                    return getattr(file, name)

                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    file.close()

                def write(self, data):
                    disk.room -= len(data)
                    if disk.room < 0:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return write(data)

            return Limited()
        return file


def test_a_write_that_fails_at_any_byte_leaves_nothing(tmp_path, crystals, monkeypatch):
    disk = FullDisk(10**9)
    for module in (writing, files):  # the shards; index and manifest
        monkeypatch.setattr(module, "open", disk.open, raising=False)
    write(tmp_path / "whole", crystals)
    size = 10**9 - disk.room
    for room in np.linspace(0, size - 1, 60).astype(int):
        disk.room = int(room)
        with pytest.raises(OSError, match=rf"No space left.*{tmp_path}/d"):
            write(tmp_path / "d", crystals)
        assert [p.name for p in tmp_path.iterdir()] == ["whole"]


# A kill


STEPS = ("fsync", "replace", "rename", "unlink")


def prepare_until(config, most):
    """Prepares in a child that is killed after so many writes and file operations; returns how
    many it did, or None where it was killed."""
    ours, theirs = FORK.Pipe(duplex=False)

    def child():
        done = 0

        def counted(function):
            def call(*args, **options):
                nonlocal done
                if done == most:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                return function(*args, **options)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        writing._OpenShard.add = counted(writing._OpenShard.add)
        prepare(config)
        theirs.send(done)

    process = FORK.Process(target=child)
    process.start()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0
    return ours.recv()


def test_prepare_killed_at_32_points_then_run_again(tmp_path, crystals):
    write(tmp_path / "source", crystals)

    def config(name):
        return PrepareConfig(
            input=str(tmp_path / "source"),
            output=str(tmp_path / name),
            targets=["gap"],
            split="keep",
            cell="as_is",
            shard_size=7,
            workers=1,
            progress=False,
        )

    total = prepare_until(config("wanted"), -1)
    assert total > COUNT + 10
    wanted = Manifest.load(tmp_path / "wanted")
    outcomes = []
    rng = np.random.default_rng(3)
    for step in [*rng.choice(total - 12, 20, replace=False).tolist(), *range(total - 12, total)]:
        name = f"at-{step}"
        assert prepare_until(config(name), step) is None
        try:
            found = Manifest.load(tmp_path / name)
            outcomes.append("whole")
            assert prepare(config(name)) == found
        except ValueError as error:
            assert "is not a data set" in str(error)
            outcomes.append("nothing")
            found = prepare(config(name))
        assert found == wanted
        assert lost(Dataset.open(tmp_path / name), crystals, range(COUNT)) == []
        assert not (tmp_path / f".{name}.partial").exists()
    assert set(outcomes) == {"whole", "nothing"}
