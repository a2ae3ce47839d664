"""One process at a time, where the file system has locks and where it says that it has none."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import time

import pytest

from crysforge.datapipe.common import locks, owners, temporary
from crysforge.datapipe.common.claims import claim_directory
from crysforge.datapipe.common.files import replacing_directory, write_text
from crysforge.datapipe.common.locks import Lock
from crysforge.datapipe.common.owners import OwnerFile, owner_of
from crysforge.datapipe.common.processes import Process
from tests.families import left_of, living, parent_of, until

FORK = multiprocessing.get_context("fork")
ANSWERS = ["ENOSYS", "EBADF", "ENOLCK", "EOPNOTSUPP"]


@pytest.fixture(params=["with locks", *ANSWERS])
def system(request, monkeypatch):
    """A file system with locks, or one that answers so to who asks for one."""
    if request.param != "with locks":
        number = getattr(errno, request.param)

        def refuse(file, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        monkeypatch.setattr(locks, "_said", False)
    return request.param


def taken(path) -> bool:
    """Whether a new process can take the lock; it gives it back."""
    results = FORK.Queue()

    def work():
        try:
            Lock(path, "busy").release()
            results.put(True)
        except ValueError as error:
            results.put(str(error))

    process = FORK.Process(target=work)
    process.start()
    found = results.get(timeout=60)
    process.join()
    return found


def test_one_has_it(tmp_path, system):
    path = tmp_path / "lock"
    with Lock(path, "busy") as lock:
        assert lock.held
        assert taken(path) == f"busy ({Process.of(os.getpid())})"
        with pytest.raises(ValueError, match="busy"):
            Lock(path, "busy")
    assert not lock.held
    assert taken(path) is True
    assert list(tmp_path.iterdir()) == []


def test_it_goes_with_its_process_and_is_not_its_childrens(tmp_path, system):
    """Even those that are not bound to it."""

    def work():
        lock = Lock(tmp_path / "lock", "busy")
        if os.fork() == 0:
            assert not lock.held
            lock.release()
            (tmp_path / "there").touch()
        signal.pause()

    with parent_of(work) as process:
        until((tmp_path / "there").exists, "there is a child")
        (child,) = process.children()
        assert "busy" in taken(tmp_path / "lock")
        process.kill()
        left_of([process])
        assert taken(tmp_path / "lock") is True
        assert living([child])
        child.kill()


def test_waiting_for_it(tmp_path, system):
    with parent_of(lambda: hold(tmp_path)) as process:
        until((tmp_path / "held").exists, "it is held")
        with pytest.raises(ValueError, match="busy"):
            Lock(tmp_path / "lock", "busy", wait=0.1)
        os.kill(process.pid, signal.SIGUSR1)
        Lock(tmp_path / "lock", "busy", wait=60).release()


def hold(folder):
    """Holds the lock of a folder until SIGUSR1."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    with Lock(folder / "lock", "busy"):
        (folder / "held").touch()
        signal.sigwait({signal.SIGUSR1})


def test_of_many_one_has_it_each_time(tmp_path, system):
    """They add to a number that only the lock keeps right."""
    (tmp_path / "count").write_text("0")

    def work():
        for _ in range(10):
            with Lock(tmp_path / "lock", "busy", wait=60):
                count = int((tmp_path / "count").read_text())
                (tmp_path / "count").write_text(str(count + 1))

    processes = [FORK.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert (tmp_path / "count").read_text() == "40"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["count"]


def test_it_moves_with_its_directory(tmp_path, system):
    with claim_directory(tmp_path / "partial", "busy") as lock:
        (tmp_path / "partial").rename(tmp_path / "whole")
        lock.moved(tmp_path / "whole" / "lock")
        assert lock.held
        assert "busy" in taken(tmp_path / "whole" / "lock")
    assert list((tmp_path / "whole").iterdir()) == []


def test_a_fault_of_ours_is_none_of_the_file_systems(tmp_path):
    file = os.open(tmp_path, os.O_RDONLY)
    os.close(file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        locks.flock(file, fcntl.LOCK_EX)


# Where there are none


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "_said", False)


def owner(path, process, seen: float, **more):
    """The file of an owner that was seen so many seconds ago."""
    path.write_text(json.dumps({"token": "theirs", **process.to_json(), **more}))
    os.utime(path, (time.time() - seen, time.time() - seen))


def test_it_is_said_once(tmp_path, no_locks, caplog):
    for _ in range(3):
        with Lock(tmp_path / "lock", "busy"):
            write_text(tmp_path / "file", "")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "has no file locks (flock: Function not implemented)" in record.getMessage()


def test_nfs_locks_nothing_that_is_open_for_reading_only(tmp_path, monkeypatch, caplog):
    """Which says nothing of its locks."""
    flock = fcntl.flock

    def answer(file, operation):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", answer)
    with replacing_directory(tmp_path / "folder"), Lock(tmp_path / "lock", "busy"):
        assert "busy" in taken(tmp_path / "lock")
        assert not owner_of(tmp_path / "lock").exists()
    assert caplog.records == []


def test_who_is_known_to_be_gone_is_not_waited_for(tmp_path, no_locks):
    gone = Process.of(os.getpid()).to_json() | {"started": "1"}
    owner(owner_of(tmp_path / "lock"), Process.from_json(gone), seen=0)
    with Lock(tmp_path / "lock", "busy"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seen", "free"), [(0, False), (50, False), (70, True)])
@pytest.mark.parametrize("content", ["whole", "empty", "nonsense"])
def test_who_is_elsewhere_has_it_as_long_as_it_is_seen(tmp_path, no_locks, seen, free, content):
    path = owner_of(tmp_path / "lock")
    owner(path, Process("node7", 12, "3", ""), seen)
    if content != "whole":
        when = path.stat().st_mtime
        path.write_text("" if content == "empty" else '{"pid": []')
        os.utime(path, (when, when))
    if free:
        Lock(tmp_path / "lock", "busy").release()
        assert list(tmp_path.iterdir()) == []
    else:
        words = r"busy \(process 12 on node7\)" if content == "whole" else "busy"
        with pytest.raises(ValueError, match=words):
            Lock(tmp_path / "lock", "busy")
        assert path.exists()


def test_who_has_it_is_seen(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(owners, "BEAT_S", 0.01)
    with Lock(tmp_path / "lock", "busy"):
        path = owner_of(tmp_path / "lock")
        os.utime(path, (1, 1))
        until(lambda: path.stat().st_mtime > 1, "it is touched")


def test_who_was_not_seen_for_too_long_knows_that_it_lost_it(tmp_path, no_locks):
    with Lock(tmp_path / "lock", "busy") as lock:
        owner(owner_of(tmp_path / "lock"), Process("node7", 12, "3", ""), seen=0)  # took it over
        assert not lock.held
    assert json.loads(owner_of(tmp_path / "lock").read_text())["host"] == "node7"


def test_of_many_who_find_it_left_one_takes_it_over(tmp_path, no_locks):
    for number in range(10):
        path = owner_of(tmp_path / f"lock-{number}")
        owner(path, Process("node7", 12, "3", ""), seen=1000)
        barrier, results = FORK.Barrier(4), FORK.Queue()

        def work(path=path, barrier=barrier, results=results):
            barrier.wait(60)
            results.put(OwnerFile.claimed(path) is not None)
            barrier.wait(60)  # whoever has it has it until all have tried

        processes = [FORK.Process(target=work) for _ in range(4)]
        for process in processes:
            process.start()
        assert sum(results.get(timeout=60) for _ in processes) == 1
        for process in processes:
            process.join()


def test_what_is_written_counts_as_left_after_a_day(tmp_path, no_locks):
    for name, age in ((".out.00000000.tmp", 2), (".out.00000001.tmp", 0)):
        (tmp_path / name).touch()
        when = time.time() - age * temporary.FORGOTTEN_S
        os.utime(tmp_path / name, (when, when))
    write_text(tmp_path / "out", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.00000001.tmp", "out"]
