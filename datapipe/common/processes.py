"""Processes that end with the one that needs them, and how to tell whether another one lives."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

LOOK_S = 0.2
"""Seconds between two looks at a process that is not our parent, or is one without a signal."""

_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Parent:
    """The process that starts another. To be made there, by `here`, and used in the other.

    Linux kills a process with its parent, whatever it does or waits for, if it asks for that; but
    it takes the thread that started the process for the parent. So only the children of a main
    thread ask, which lasts as long as its process; others, and those elsewhere, look again and
    again who their parent is.
    """

    pid: int
    by_main_thread: bool

    @classmethod
    def here(cls) -> Parent:
        """This process and thread."""
        return cls(os.getpid(), threading.get_native_id() == os.getpid())

    def end_with_me(self) -> None:
        """Binds the calling process, a child of this parent: from now on the end of the parent is
        the end of the child, at once and by SIGKILL."""
        if not self._signals():
            start_watching(lambda: os.getppid() == self.pid, _die)
        self._be_there()

    def end_program_with_me(self) -> None:
        """The same between fork and exec, for what a child becomes (`preexec_fn`): where there is
        no signal, nothing."""
        if self._signals():
            self._be_there()

    def _signals(self) -> bool:
        if _LIBC is None or not self.by_main_thread:
            return False
        return _LIBC.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0) == 0

    def _be_there(self) -> None:
        if os.getppid() != self.pid:  # it ended before we could ask
            _die()


@dataclass(frozen=True)
class Process:
    """A process of some machine, so that no other one is taken for it."""

    host: str
    pid: int
    started: str
    """When, as its machine counts; empty where that is not known."""
    space: str
    """The start of the machine and its container that the number belongs to."""

    @classmethod
    @cache
    def _space(cls) -> str:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
            return f"{boot} {os.readlink('/proc/self/ns/pid')}"
        except OSError:
            return ""

    @classmethod
    def of(cls, pid: int) -> Process:
        """A process of this machine."""
        return cls(socket.gethostname(), pid, _started(pid), cls._space())

    @classmethod
    def from_json(cls, values: object) -> Process:
        """What `to_json` gave. Raises ValueError for anything else."""
        found = values if isinstance(values, dict) else {}
        texts = [found.get(key) for key in ("host", "started", "space")]
        fit = all(isinstance(x, str) and x.isprintable() for x in texts)
        if not fit or not isinstance(found.get("pid"), int):
            raise ValueError("no process")
        host, started, space = map(str, texts)
        return cls(host, found["pid"], started, space)

    def to_json(self) -> dict[str, str | int]:
        """As JSON values."""
        return asdict(self)

    def alive(self) -> bool | None:
        """Whether it lives; None where that cannot be told from here."""
        if (self.host, self.space) != (socket.gethostname(), self._space()):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return self.pid > 0 and _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _started(pid: int) -> str:
    """When a process was started, in ticks since that of the machine; empty if it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if words[0] in (b"Z", b"X") else words[19].decode()


def start_watching(lives: Callable[[], bool | None], end: Callable[[], None]) -> None:
    """Calls `end` from a thread as soon as something lives no longer."""

    def watch() -> None:
        while lives() is not False:
            time.sleep(LOOK_S)
        end()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
