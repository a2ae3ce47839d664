"""Watches a process while it reads what a stranger wrote: no code of his runs, nothing outside one
directory is written, removed or sent away, and a secret stays unread.

Python tells an audit hook of every file that is opened, process that is started and connection that
is made, whoever asks for it; what is forbidden is stopped there and then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from crysforge.datapipe.common import workers
from crysforge.datapipe.common.workers import Workers

RUNS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile",
    "os.fork", "os.forkpty", "pty.spawn", "pickle.find_class", "ctypes.dlopen", "code.__new__",
)  # fmt: skip
SENDS = (
    "socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind",
    "urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect",
)  # fmt: skip
CHANGES = {
    "os.remove": (0, 1), "os.rename": (0, 2), "os.rmdir": (0, 1), "os.mkdir": (0, 1),
    "os.link": (1, 2), "os.symlink": (1, 2), "os.truncate": (0, 1), "os.chmod": (0, 1),
    "os.chown": (0, 1), "os.utime": (0, 1), "shutil.rmtree": (0, 1), "shutil.move": (0, 2),
}  # fmt: skip
"""Events, and which of their arguments are changed."""
RELATIVE = ("os.remove", "os.rename", "os.rmdir")
"""Those that take open directories behind."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SECRET = "s3cret-of-the-user"


_WORKERS = {f.__code__ for f in (Workers._start, Workers._take, workers._serve)}


class Breach(BaseException):
    """Something forbidden was about to happen. No `except Exception` hides it."""


class Guard:
    """The watch of one process and of the workers that `datapipe.common.workers` forks from it;
    `armed()` for as long as a stranger's files are read.

    Args:
        folder: an empty directory; of what it gets, only `box` may change.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.box = self.folder / "box"
        self.outside = self.folder / "outside"
        self.secret = self.outside / "secret.txt"
        self._armed = False
        self._told = self.folder / "breaches"  # of workers, too
        self.box.mkdir()
        self.outside.mkdir()
        self.secret.write_text(SECRET)
        for name in ("thesis-backup.tar", "notes.tmp", "old.partial", "vae-00000001/keep.txt"):
            path = self.outside / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{name} of the user")
        self._before = self._state()
        os.environ["CRYSFORGE_TEST_SECRET"] = SECRET
        sys.addaudithook(self._hook)

    @property
    def command(self) -> str:
        """A command that leaves a trace."""
        return f"touch {self.outside / 'command-ran'}"

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Raises Breach if anything forbidden happens inside, or has happened when it ends."""
        self._told.write_text("")
        self._armed = True
        try:
            yield
        finally:
            self._armed = False
            if breaches := self._told.read_text():
                raise Breach(breaches.strip().replace("\n", "; "))
            if (now := self._state()) != self._before:
                self._before = now
                raise Breach(f"what is outside has changed: {sorted(now)}")

    def _state(self) -> dict[str, tuple[int, bytes]]:
        """All files outside of the box."""
        return {
            str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
            for p in self.outside.rglob("*")
        }

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._armed:
            return
        what = ""
        if event in ("os.fork", "pickle.find_class") and _of_our_workers():
            return
        if event in RUNS or event in SENDS:
            what = f"{event} {args[:2]!r}"[:200]
        elif event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes) and isinstance(flags, int):
                what = self._opened(os.fsdecode(path), flags)
        elif event in CHANGES:
            what = self._changed(event, args)
        if what:
            self._armed = False
            with open(self._told, "a", errors="replace") as told:
                told.write(f"{what}\n")
            self._armed = True
            raise Breach(what)

    def _changed(self, event: str, args: tuple[Any, ...]) -> str:
        """Names of files, relative to open directories perhaps, that an event changes."""
        first, last = CHANGES[event]
        directories = [x for x in args[last:] if isinstance(x, int) and x >= 0]
        for i, path in enumerate(args[first:last]):
            if isinstance(path, str | bytes | os.PathLike):
                text = os.fsdecode(path)
                if directories and event in RELATIVE:
                    descriptor = directories[min(i, len(directories) - 1)]
                    text = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), text)
                place = os.path.realpath(os.path.dirname(os.path.abspath(text)))
                if not self._allowed(os.path.join(place, os.path.basename(text))):
                    return f"{event} {text}"
        return ""

    def _opened(self, path: str, flags: int) -> str:
        real = os.path.realpath(path)
        if flags & os.O_NOFOLLOW:
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        if real == str(self.secret):
            return f"the secret was opened as {path}"
        if flags & WRITING and not self._allowed(real):
            return f"{path} was opened for writing"
        return ""

    def _allowed(self, path: str) -> bool:
        if path in (os.devnull, str(self.box)):
            return True
        return path.startswith((f"{self.box}{os.sep}", "/dev/shm/"))


def _of_our_workers() -> bool:
    """Whether our own workers ask: one is forked, or something comes through its pipe. The watch is
    in a worker as well."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals["__name__"].startswith("multiprocessing."):
        frame = frame.f_back
    return frame is not None and frame.f_code in _WORKERS
