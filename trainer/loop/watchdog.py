"""A step that takes too long ends the process, with the stacks of all threads."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path

from crysforge.datapipe.common.files import make_directory, open_append
from crysforge.trainer.loop.guards import STDERR


class Watchdog:
    """Ends a process that hangs, after writing what all its threads were doing.

    A thread watches. Where it cannot run, since the one that hangs holds the interpreter's lock,
    the stacks go to the standard error a little later.

    Args:
        seconds: time between two calls of `reset`; 0 switches it off. The first time is ten times
            as long: kernels are compiled, caches filled.
        path: where the stacks go.
    """

    EXIT = 1
    GRACE_S = 10.0
    """Seconds without the watching thread."""

    def __init__(self, seconds: float, path: Path) -> None:
        self.seconds, self.path = seconds, path
        self._deadline = float("inf")
        self._pause = min(60.0, seconds / 4)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self.reset(10)
            self._arm()
            self._thread.start()

    def reset(self, times: float = 1) -> None:
        """Tells that work goes on; the next call is due within `times` times the seconds."""
        if self.seconds:
            self._deadline = time.monotonic() + times * self.seconds

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._pause):
            self._arm()
            if time.monotonic() > self._deadline:
                self._end()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """Sets the alarm that needs no interpreter."""
        later = self._pause + self.seconds + self.GRACE_S
        faulthandler.dump_traceback_later(later, exit=True, file=STDERR)

    def _end(self) -> None:
        where = f"what all threads were doing is in {self.path}"
        try:
            make_directory(self.path.parent, parents=False)  # the run may have been deleted
            with open_append(self.path) as file:
                file.write(f"no progress for {self.seconds:g} s or more\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            where = f"what all threads were doing is above ({error})"
            faulthandler.dump_traceback(STDERR, all_threads=True)
        text = f"error: no progress for {self.seconds:g} s (trainer.step_timeout_s); {where}\n"
        os.write(STDERR, text.encode())
        os._exit(self.EXIT)
