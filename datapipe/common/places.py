"""What a path leads to: a file in its place, a link elsewhere, or no file at all, but a pipe, a
terminal or what this process was given as its output."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

_OWN = re.compile(r"/dev/(stdout|stderr)|(?:/dev/fd|/proc/self/fd)/(\d+)")


def is_stream(path: str | os.PathLike) -> bool:
    """Whether what is written to a path goes on as it comes: a pipe, a terminal, `/dev/stdout`."""
    if _OWN.fullmatch(os.fspath(path)):
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def open_stream(path: str | os.PathLike) -> int:
    """A descriptor to write to such a path; a pipe is opened when somebody reads from it.

    Raises:
        OSError: it cannot be written to.
    """
    own = _OWN.fullmatch(os.fspath(path))
    if own is None:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    # Opened by its name, a file that standard output leads to would be cut off.
    return os.dup(int(own[2]) if own[2] else ("stdout", "stderr").index(own[1]) + 1)


def own_file(path: Path) -> Path:
    """The path of a file, after checking that the file is where the path says.

    Raises:
        ValueError: it does not exist, is no regular file, or is a link that leads out of its
            directory.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError(
            f"{path} is a link out of its directory and is not followed: put a copy of the file in "
            "its place"
        )
    return path


def inside(root: Path, name: str) -> Path:
    """What is at a relative path below a directory. Raises ValueError if it, or a link on the way,
    leads out."""
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads out of {root}: put a copy there")
    return path
