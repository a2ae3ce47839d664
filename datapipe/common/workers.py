"""A function over many items in several processes, with results in order and little memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from crysforge.datapipe.common import threads
from crysforge.datapipe.common.processes import Parent

A = TypeVar("A")
B = TypeVar("B")

CHUNK = 32
"""Items that travel together."""


class Workers(Generic[A, B]):
    """Processes that apply one function.

        with Workers(parse, 4) as workers:
            for result in workers.map(items): ...

    The processes start at once. Each holds one chunk at a time and chunks go round, so that results
    come in the order of the items and no more than a chunk per process is in flight. A process
    whose parent is gone, however it went, ends too.

    Args:
        function: picklable; what it raises ends the run.
        count: processes; 1 does the work in this process, 0 takes every available core.
    """

    def __init__(self, function: Callable[[A], B], count: int = 0) -> None:
        if count < 0:
            raise ValueError(f"workers must be 0 (one for each core) or more, got {count}")
        self.function = function
        self.count = count or threads.share_of(os.environ).cpus
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        # A fork starts in milliseconds; elsewhere than on Linux it is not safe.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        for _ in range(self.count if self.count > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(  # type: ignore[attr-defined]
                target=_serve, args=(ours, theirs, function, Parent.here()), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

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
            ChildProcessError: a process was killed.
        """
        if not self._connections:
            yield from map(self.function, items)
            return
        source = iter(items)
        waiting: list[int] = [w for w in range(self.count) if self._give(w, source, chunk)]
        while waiting:
            worker = waiting[0]
            if not ordered:
                ready = wait([self._connections[w] for w in waiting])
                worker = next(w for w in waiting if self._connections[w] in ready)
            waiting.remove(worker)
            results = self._take(worker)
            if self._give(worker, source, chunk):
                waiting.append(worker)
            yield from results

    def _give(self, worker: int, source: Iterator[A], chunk: int) -> bool:
        items = list(islice(source, chunk))
        if items:
            try:
                self._connections[worker].send(items)
            except OSError:
                raise self._died() from None
        return bool(items)

    def _take(self, worker: int) -> list[B]:
        try:
            answer = self._connections[worker].recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, str):
            raise RuntimeError(f"a worker process failed:\n{answer}")
        return answer

    def _died(self) -> ChildProcessError:
        return ChildProcessError(
            "a worker process was killed, probably for want of memory: try fewer workers"
        )


def _serve(
    parents: Connection, own: Connection, function: Callable[[A], B], parent: Parent
) -> None:
    """What a process does: a chunk in, its results out, until the parent's end closes."""
    parent.end_with_me()
    parents.close()  # else this process would keep its own pipe open
    threads.single()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunk = own.recv()
            try:
                answer: Any = [function(item) for item in chunk]
            except Exception:
                answer = traceback.format_exc()
            own.send(answer)
