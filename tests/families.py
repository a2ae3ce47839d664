"""Processes with children that lose their parent; how many of them are left."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

BOUND_S = 20
"""Seconds after which what still lives is left behind; it is moments, but machines may be slow."""


def until(happened: Callable[[], Any], what: str) -> Any:
    """Waits for something, and returns what it is."""
    end = time.monotonic() + 60
    while not (found := happened()):
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.01)
    return found


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; one that nobody has asked for its exit code has."""

    def lives(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [p for p in processes if lives(p)]


def left_of(processes: list[psutil.Process], bound: float = BOUND_S) -> list[psutil.Process]:
    """Those that still live after a bounded wait; they are killed then."""
    end = time.monotonic() + bound
    while (left := living(processes)) and time.monotonic() < end:
        time.sleep(0.01)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return left


def session_of(process: psutil.Process) -> int:
    """Number of its session; 0 if it has ended."""
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return 0


@contextmanager
def parent_of(work: Callable[[], Any]) -> Iterator[psutil.Process]:
    """A process that does some work, and ends at the end of the block at the latest."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    process = psutil.Process(pid)
    try:
        yield process
    finally:
        if living([process]):
            left_of([process, *process.children(recursive=True)], bound=0)
        os.waitpid(pid, 0)


def orphans(parent: psutil.Process, number: int = signal.SIGKILL) -> list[psutil.Process]:
    """Sends a signal to a process that ends it; what of its children and theirs still lives a
    little later."""
    family = parent.children(recursive=True)
    assert family, "it has no children"
    parent.send_signal(number)
    until(lambda: not living([parent]), "the parent has ended")
    return left_of(family)
