"""Directories that one process has for itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from crysforge.datapipe.common.files import make_directory
from crysforge.datapipe.common.locks import Lock
from crysforge.datapipe.common.owners import owner_of
from crysforge.datapipe.common.temporary import is_temporary

LOCK = "lock"
"""The file in it that says so."""
_LOCKS = (LOCK, owner_of(Path(LOCK)).name)


def claim_directory(path: Path, busy: str, wait: float = 0.0) -> Lock:
    """Makes a directory unless it is there, and takes it for this process. `busy` is what to say if
    another one has it for longer than `wait` seconds.

    Raises:
        ValueError: another process has it.
        OSError: a link or a file is there.
    """
    try:
        make_directory(path)
        return Lock(path / LOCK, busy, wait)
    except (FileNotFoundError, FileExistsError):  # the other one has just moved it away
        raise ValueError(busy) from None


def is_unused(path: Path) -> bool:
    """Whether a directory is not there, or has no more than locks and what is being written."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False
    return all(map(is_lock_or_temporary, names))


def is_lock_or_temporary(name: str) -> bool:
    """Whether a file of this name is a lock, or being written."""
    return name in _LOCKS or is_temporary(name)


def empty_directory(path: Path) -> None:
    """Removes what is in a directory, but its lock."""
    for entry in path.iterdir():
        if entry.name not in _LOCKS:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def refuse_links_out(root: Path, but: str = "\0") -> None:
    """Raises ValueError for a link in a directory that leads out of it: what is read, written and
    removed there must be its own.

    Args:
        but: what is in directories whose names begin so is not looked at.
    """
    root = root.resolve()
    for folder, directories, files in os.walk(root):
        for path in (Path(folder, name) for name in (*directories, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise ValueError(
                    f"{path} is a symbolic link out of {root}, where it would write: put what it "
                    "leads to in its place"
                )
        directories[:] = [name for name in directories if not name.startswith(but)]
