"""Outputs that are no files: pipes, terminals, and what this process was given as its output."""

from __future__ import annotations

import os
import re
import stat

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
