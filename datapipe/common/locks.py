"""Locks between processes, on file systems with locks and on those without.

`flock` is the lock where there is one: the system drops it with the process. Some cluster file
systems answer that they have none (Lustre without its option `flock`, NFS without its lock daemon).
There a file that names its owner is the lock, see datapipe/common/owners.py.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import time
import weakref
from pathlib import Path

from crysforge.datapipe.common.owners import OwnerFile, owner_of, process_in
from crysforge.datapipe.common.processes import Process

log = logging.getLogger(__name__)

POLL_S = 0.05
"""Seconds between two tries to get a lock that somebody has."""

_NONE = (errno.ENOSYS, errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What systems answer that have no locks, or (EBADF) none for this way of opening a file."""
_said = False


def flock(file: int, operation: int) -> bool | None:
    """`fcntl.flock`, and whether the lock is ours: False if another has it and LOCK_NB says not to
    wait, None if the file system has no such locks, which is a warning, once; or, without one, if
    it has none for what is open for reading only."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NONE:
            raise
        how = fcntl.fcntl(file, fcntl.F_GETFL)  # a file that is not open is a fault of ours
        if error.errno != errno.EBADF or how & os.O_ACCMODE != os.O_RDONLY:
            _say_once(error)
        return None
    return True


def _say_once(error: OSError) -> None:
    global _said
    first = multiprocessing.current_process().name
    if not _said and (first == "MainProcess" or first.endswith("-1")):  # of workers, one is enough
        log.warning(
            "the file system has no file locks (flock: %s): files that name their owner take their "
            "place",
            error.strerror,
        )
    _said = True


class Lock:
    """What only one process has at a time, of all that share the file system.

        with Lock(folder / "lock", "another process is writing here: let it finish"):
            ...

    Processes that are forked meanwhile do not have it.

    Args:
        path: of a file, which is made; with the lock it goes. Its directory must be there.
        busy: what to say if another process has it.
        wait: seconds to wait for it.

    Raises:
        ValueError: another process has it.
        FileNotFoundError: there is no such directory.
    """

    def __init__(self, path: str | os.PathLike, busy: str, wait: float = 0.0) -> None:
        self.path = Path(path)
        self._file: int | None = None
        self._owner: OwnerFile | None = None
        end = time.monotonic() + wait
        while not self._taken():
            if time.monotonic() >= end:
                raise ValueError(f"{busy}{self._holder()}")
            time.sleep(POLL_S)
        _HELD.add(self)

    def _taken(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            ours = flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if ours is None:
                self._owner = OwnerFile.claimed(owner_of(self.path))
                return self._owner is not None
            if ours and is_at(file, self.path):  # the holder before may have removed it meanwhile
                os.ftruncate(file, 0)
                os.write(file, json.dumps(Process.of(os.getpid()).to_json()).encode())
                self._file, file = file, -1
                return True
            return False
        finally:
            if file >= 0:
                os.close(file)

    def _holder(self) -> str:
        """Who has it, in brackets, if that is known."""
        for path in (self.path, owner_of(self.path)):
            if holder := process_in(path):
                return f" ({holder})"
        return ""

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this process has it, as far as it knows: who was frozen for more than a minute
        may have lost it where the file system has no locks."""
        return self._file is not None or (self._owner is not None and self._owner.held())

    def moved(self, path: Path) -> None:
        """To be called when its directory was renamed: where its file is now."""
        self.path = path
        if self._owner is not None:
            self._owner.path = owner_of(path)

    def release(self) -> None:
        """Gives it back, and removes its file."""
        owner, self._owner = self._owner, None
        file, self._file = self._file, None
        if owner is not None and owner.held():
            self.path.unlink(missing_ok=True)
        if owner is not None:
            owner.release()
        if file is not None:
            if is_at(file, self.path):
                self.path.unlink(missing_ok=True)
            os.close(file)

    def forget(self) -> None:
        """In a process that was forked: it is the parent's."""
        if self._file is not None:
            os.close(self._file)
        if self._owner is not None:
            self._owner.stop()
        self._file = self._owner = None

    __del__ = forget


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)


def is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
