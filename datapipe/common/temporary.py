"""What is being written, under names beside its place; and what killed processes left of it.

A name is `.NAME.<8 digits>.tmp`, or `.partial` for a directory. Who writes holds a lock on it,
which the system drops with the process: what nobody holds was left, and goes with the next writing
to the same place. Where the file system has no locks, what was not touched for a day was left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from crysforge.datapipe.common.locks import flock, is_at

FORGOTTEN_S = 86400.0
"""Seconds after which what is being written is taken for left, where there are no locks."""

_END = r"[0-9a-f]{8}\.(tmp|partial|old)"


def is_temporary(name: str) -> bool:
    """Whether a file or directory of this name is one that takes its place later (`.NAME.tmp`: of
    earlier versions)."""
    return re.fullmatch(rf"\..+\.({_END}|tmp)", name) is not None


def name_beside(path: Path, kind: str) -> Path:
    """A name for what takes a place later, unlike any other."""
    return path.with_name(f"{_stem(path)}{secrets.token_hex(4)}.{kind}")


def new_file(path: Path) -> tuple[Path, int]:
    """An empty file beside a path, which nobody else has, and a handle to it: as long as that is
    open, nobody takes the file for left."""
    _remove_left(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = name_beside(path, "tmp")
        guard = os.open(temporary, flags, 0o666)
        if _guards(guard, temporary):
            return temporary, guard


@contextlib.contextmanager
def filling(path: Path, kind: str) -> Iterator[Path]:
    """An empty directory beside a path, which nobody else has; if the block fails, it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path)
    while True:
        work = name_beside(path, kind)
        work.mkdir()
        guard = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if _guards(guard, work):
            break
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(guard)


def _stem(path: Path) -> str:
    """What the names begin with that are beside a path: names may have 255 bytes."""
    return f".{os.fsdecode(os.fsencode(path.name)[:200])}."


def _guards(guard: int, path: Path) -> bool:
    """Whether others see that we are at what is there; if not, they have just removed it."""
    if flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB) is not False and is_at(guard, path):
        return True
    os.close(guard)
    return False


def _remove_left(path: Path) -> None:
    """Removes what killed processes left beside a path."""
    left = re.compile(re.escape(_stem(path)) + _END)
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if left.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_left(Path(entry.path), entry.is_dir(follow_symlinks=False))


def _remove_if_left(path: Path, directory: bool) -> None:
    how = os.O_RDONLY | os.O_DIRECTORY if directory else os.O_RDWR  # NFS locks no others
    file = os.open(path, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        free = flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if free is None:
            newest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
            free = time.time() - newest > FORGOTTEN_S
        if free and is_at(file, path):
            shutil.rmtree(path, ignore_errors=True) if directory else path.unlink()
    finally:
        os.close(file)
