"""A function over many items in several processes, with results in order and little memory."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from crysforge.datapipe.common import threads
from crysforge.datapipe.common.processes import Parent

A = TypeVar("A")
B = TypeVar("B")

CHUNK = 32
"""Items that travel together."""

MAX_WORKERS = 1024
"""Most processes that may be asked for."""

_THREAD_BYTES = 80 << 20
"""Addresses that a thread of a linear algebra library sets aside, and hardly uses: its stack and a
buffer."""


@dataclass(frozen=True)
class Guard(Generic[A, B]):
    """What one item may cost, and what stands in its place if it costs more.

    An item that takes too long, or whose process is killed (by the system for want of memory, by a
    fault of foreign code), costs itself alone: what travelled with it is done again, item by item,
    in a new process.
    """

    lost: Callable[[A, str], B]
    """Makes the result of a lost item from the item and the reason: "took more than 60 s"."""
    seconds: float
    """Processor time of an item."""
    memory_bytes: int
    """Memory of a process, beyond what it has at its start. A function that needs more gets a
    MemoryError."""

    def reason(self, code: int) -> str:
        """Why an item is lost whose process ended with an exit code."""
        if code == -signal.SIGPROF:
            return f"took more than {self.seconds:g} s of processor time"
        if code == -signal.SIGKILL:
            return "killed its process, probably for want of memory"
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"ended its process ({how})"

    def limit_memory(self) -> None:
        """Sets the limit for this process, where the system tells what it holds."""
        with contextlib.suppress(OSError, ValueError):
            with open("/proc/self/statm") as file:
                held = int(file.read().split()[0]) * resource.getpagesize()
            most = held + self.memory_bytes + _THREAD_BYTES * (os.cpu_count() or 1)
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            if soft == resource.RLIM_INFINITY or most < soft:
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))


class Workers(Generic[A, B]):
    """Processes that apply one function.

        with Workers(parse, 4) as workers:
            for result in workers.map(items): ...

    The processes start at once. Each holds one chunk at a time and chunks go round, so that results
    come in the order of the items and no more than a chunk per process is in flight. A process
    whose parent is gone, however it went, ends too.

    Args:
        function: picklable; what it raises ends the run.
        count: processes; 1 does the work in this process unless there is a guard, 0 takes every
            available core.
        guard: what an item may cost; None: a killed process ends the run.
    """

    def __init__(
        self, function: Callable[[A], B], count: int = 0, guard: Guard[A, B] | None = None
    ) -> None:
        if not 0 <= count <= MAX_WORKERS:
            raise ValueError(f"workers must be 0 (one for each core) to {MAX_WORKERS}, got {count}")
        self.function, self.guard = function, guard
        self.count = count or threads.share_of(os.environ).cpus
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(self.count if self.count > 1 or guard else 0):
            connection, process = self._start()
            self._connections.append(connection)
            self._processes.append(process)

    def _start(self) -> tuple[Connection, Any]:
        # A fork starts in milliseconds; elsewhere than on Linux it is not safe.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        ours, theirs = context.Pipe()
        process = context.Process(  # type: ignore[attr-defined]
            target=_serve,
            args=(ours, theirs, self.function, self.guard, Parent.here()),
            daemon=True,
        )
        process.start()
        theirs.close()
        return ours, process

    def __enter__(self) -> Workers[A, B]:
        return self

    def __exit__(self, *error: object) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()

    def map(self, items: Iterable[A], chunk: int = CHUNK, ordered: bool = True) -> Iterator[B]:
        """Results of the items, in their order; or as they come, where some take far longer than
        others and should not hold them up. `chunk` items travel together.

        Raises:
            RuntimeError: the function raised.
            ChildProcessError: a process was killed, and there is no guard.
        """
        if not self._connections:
            yield from map(self.function, items)
            return
        source = iter(items)
        given: dict[int, list[A]] = {}  # what each worker is at, the longest at work first
        for worker in range(self.count):
            if some := list(islice(source, chunk)):
                self._give(worker, some)
                given[worker] = some
        while given:
            worker = next(iter(given))
            if not ordered:
                ready = wait([self._connections[w] for w in given])
                worker = next(w for w in given if self._connections[w] in ready)
            results = self._take(worker, given.pop(worker))
            if some := list(islice(source, chunk)):
                self._give(worker, some)
                given[worker] = some
            yield from results

    def _give(self, worker: int, items: list[A]) -> None:
        with contextlib.suppress(OSError):  # it was killed: `_take` sees to that
            self._connections[worker].send(items)

    def _take(self, worker: int, items: list[A], again: bool = False) -> list[B]:
        try:
            answer = self._connections[worker].recv()
        except (EOFError, OSError):
            return self._after_kill(worker, items, again)
        if isinstance(answer, str):
            raise RuntimeError(f"a worker process failed:\n{answer}")
        return answer

    def _after_kill(self, worker: int, items: list[A], again: bool) -> list[B]:
        """Results of items whose process was killed, by a new one, item by item; the one whose
        process is killed `again` is lost."""
        self._connections[worker].close()
        self._processes[worker].join()
        if self.guard is None:
            raise ChildProcessError(
                "a worker process was killed, probably for want of memory: try fewer workers"
            )
        reason = self.guard.reason(self._processes[worker].exitcode)
        self._connections[worker], self._processes[worker] = self._start()
        if again:
            return [self.guard.lost(items[0], reason)]
        results = []
        for item in items:
            self._give(worker, [item])
            results += self._take(worker, [item], again=True)
        return results


def _serve(
    parents: Connection,
    own: Connection,
    function: Callable[[A], B],
    guard: Guard[A, B] | None,
    parent: Parent,
) -> None:
    """What a process does: a chunk in, its results out, until the parent's end closes."""
    parent.end_with_me()
    parents.close()  # else this process would keep its own pipe open
    threads.single()
    gc.freeze()  # what was there before need not be looked through again and again
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGPROF", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    if guard is not None:
        guard.limit_memory()
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunk = own.recv()
            try:
                answer: Any = [_one(function, item, guard) for item in chunk]
            except Exception:
                answer = traceback.format_exc()
            own.send(answer)


def _one(function: Callable[[A], B], item: A, guard: Guard[A, B] | None) -> B:
    """The result of an item; too long at work, the process is ended, whatever code it runs."""
    if guard is None:
        return function(item)
    signal.setitimer(signal.ITIMER_PROF, guard.seconds)
    try:
        return function(item)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
