"""Watches a process while it reads what a stranger wrote: no code of his runs, nothing outside one
directory is written, removed or sent away, and a secret stays unread.

Python tells an audit hook of every file that is opened, process that is started and connection that
is made, whoever asks for it; what is forbidden is stopped there and then.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUNS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile",
    "os.fork", "os.forkpty", "pty.spawn", "pickle.find_class", "ctypes.dlopen", "code.__new__",
)  # fmt: skip
OWN = {
    "os.fork": ("multiprocessing/popen_fork.py", "_launch"),
    "pickle.find_class": ("multiprocessing/connection.py", "recv"),
}
"""What workers of ours need, and where alone: they are watched as well."""
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
LONGEST = 30
"""Seconds that reading may take."""
SECRET = "s3cret-of-the-user"


class Breach(BaseException):
    """Something forbidden was about to happen. No `except Exception` hides it."""


def _too_long(number: int, frame: object) -> None:
    raise Breach(f"takes longer than {LONGEST} s")


def _is_called_in(file: str, function: str) -> bool:
    """Whether what the hook was told of is done by a function of a file."""
    code = sys._getframe(2).f_code
    return code.co_filename.endswith(file) and code.co_name == function


class Guard:
    """The watch of one process; `armed()` for as long as a stranger's files are read.

    Args:
        folder: an empty directory; of what it gets, only `box` may change.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.box = self.folder / "box"
        self.outside = self.folder / "outside"
        self.secret = self.outside / "secret.txt"
        self._armed = False
        self._breaches = mmap.mmap(-1, 1 << 16)  # of this process and of all that it forks
        self.box.mkdir()
        self.outside.mkdir()
        self.secret.write_text(SECRET)
        for name in (
            "thesis-backup.tar", "notes.tmp", "old.partial", "vae-00000001/keep.txt", "report.md",
        ):  # fmt: skip
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
        self._armed, self._breaches[:] = True, bytes(len(self._breaches))
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LONGEST)
        try:
            yield
        finally:
            signal.alarm(0)
            self._armed = False
            if found := self._breaches[:].partition(b"\0")[0]:
                raise Breach(found.decode(errors="replace"))
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
        if event in RUNS or event in SENDS:
            if event in OWN and _is_called_in(*OWN[event]):
                return
            what = f"{event} {args[:2]!r}"[:200]
        elif event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes) and isinstance(flags, int):
                what = self._opened(os.fsdecode(path), flags)
        elif event in CHANGES:
            what = self._changed(event, args)
        if what:
            if not self._breaches[0]:
                text = what.encode(errors="replace")[: len(self._breaches) - 1]
                self._breaches[: len(text)] = text
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
