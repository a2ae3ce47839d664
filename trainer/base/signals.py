"""Stopping in time: a signal or the end of the walltime asks this process to stop.

While a model is trained a handler only sets a flag. The loop asks once per step, all ranks agree, a
checkpoint is written together, and the process exits with `REQUEUE` (after Ctrl-C with
`INTERRUPTED`): the same command continues the run. Other work ends where it is.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

REQUEUE = 75
"""Exit code of a run that stopped before its end and can be continued (EX_TEMPFAIL)."""

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""What schedulers send before they end a job."""


INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class Requeue(SystemExit):
    """Ends the process with exit code `REQUEUE`, after Ctrl-C with `INTERRUPTED`; the run is
    saved."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(INTERRUPTED if reason == "SIGINT" else REQUEUE)


class Stopped(BaseException):
    """A signal of `SIGNALS` ends what the process does; the message is its name."""


@contextmanager
def stopping() -> Iterator[None]:
    """Lets the signals that schedulers send raise `Stopped` in the block, so that what is half done
    is cleared away; unless the block, or who started the process, handles them otherwise."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(signal.Signals(number).name)

    main = threading.current_thread() is threading.main_thread()
    old = {n: signal.getsignal(n) for n in SIGNALS} if main else {}
    for number, handler in old.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class StopRequest:
    """Whether this process was asked to stop, and by what. Create it in the main thread.

    Args:
        walltime_minutes: time the process has, from now; Slurm's own end of the job counts too.
        margin_minutes: time left for the last save; at most a fifth of the walltime, so that a
            short job gets something done.
        environ: where Slurm's SLURM_JOB_END_TIME (seconds since 1970) is looked up.

    Attributes:
        reason: empty, or what asked: `SIGTERM`, `SIGUSR1`, `SIGUSR2`, `SIGINT` or `walltime`.
    """

    def __init__(
        self,
        walltime_minutes: float | None = None,
        margin_minutes: float = 3.0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.reason = ""
        left = _time_left(walltime_minutes, os.environ if environ is None else environ)
        self._deadline = None if left is None else time.monotonic() + left
        self._margin = 60 * margin_minutes
        if left is not None:
            self._margin = min(self._margin, max(0.0, left) / 5)
        self._asked: float | None = None
        self._longest = 0.0
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.reason = signal.Signals(number).name

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Lets the first Ctrl-C in the block ask to stop, and say so; the second one interrupts."""

        def ask(number: int, frame: object) -> None:
            if self.reason:
                raise KeyboardInterrupt
            self.reason = "SIGINT"
            os.write(2, b"\nstopping after this step, to save; Ctrl-C again ends at once\n")

        old = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)

    def wanted(self) -> bool:
        """Whether to stop now. Called once per step: stops when the time that is left is less than
        the longest step so far (with validation and save) and the margin."""
        now = time.monotonic()
        if self._asked is not None:
            self._longest = max(self._longest, now - self._asked)
        self._asked = now
        end = now + self._longest + self._margin
        if not self.reason and self._deadline is not None and end >= self._deadline:
            self.reason = "walltime"
        return bool(self.reason)


def _time_left(minutes: float | None, environ: Mapping[str, str]) -> float | None:
    """Seconds to the earliest end that is known."""
    left = [] if minutes is None else [60 * minutes]
    if environ.get("SLURM_JOB_END_TIME", "").isdigit():
        left.append(float(environ["SLURM_JOB_END_TIME"]) - time.time())
    return min(left, default=None)
