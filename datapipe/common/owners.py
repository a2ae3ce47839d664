"""A lock for file systems that have none: a file that names its owner, who touches it every few
seconds. One whose owner is known to be dead, or has not been seen for a minute, is taken over."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from pathlib import Path

from crysforge.datapipe.common.processes import Process
from crysforge.datapipe.common.safe_read import read_mapping

BEAT_S, STALE_S = 10.0, 60.0
"""Seconds between two touches, and without any until it is nobody's."""
POLL_S, SETTLE_S = 0.05, 0.2
"""Seconds between two tries to get one that somebody has, and until one that was taken over is
surely ours."""


class OwnerFile:
    """A lock; to be had from `claimed` or `waited_for`."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token
        self._ended = threading.Event()
        threading.Thread(target=self._touch, name="lock owner", daemon=True).start()

    @classmethod
    def claimed(cls, path: Path) -> OwnerFile | None:
        """The lock at a path, or None if somebody has it."""
        left = _abandoned(path)
        if left is not None and not _removed(path, left):
            return None
        token = secrets.token_hex(8)
        content = {"token": token, **Process.of(os.getpid()).to_json()}
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return None
        with open(file, "wb") as stream:
            stream.write(json.dumps(content).encode())
        if left is not None:
            time.sleep(SETTLE_S)  # others who found it left may just be about to move ours away
            if _token_in(path) != token:
                return None
        return cls(path, token)

    @classmethod
    def waited_for(cls, path: Path) -> OwnerFile:
        """The lock at a path, when nobody has it any more."""
        while (owner := cls.claimed(path)) is None:
            time.sleep(POLL_S)
        return owner

    def __enter__(self) -> OwnerFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def held(self) -> bool:
        """Whether nobody has taken it over."""
        return _token_in(self.path) == self.token

    def stop(self) -> None:
        """Touches it no more."""
        self._ended.set()

    def release(self) -> None:
        """Gives it back."""
        self.stop()
        if self.held():
            self.path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if self.held():
                    os.utime(self.path)


def owner_of(path: Path) -> Path:
    """Where the owner of a lock is named that the file system cannot hold."""
    return path.with_name(f"{path.name}.owner")


def process_in(path: Path) -> Process | None:
    """The process that a lock's file names, if it does."""
    return _process(_content(path))


def _content(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        return read_mapping(path)
    return {}


def _token_in(path: Path) -> str:
    return str(_content(path).get("token", ""))


def _process(content: dict) -> Process | None:
    with contextlib.suppress(ValueError):
        return Process.from_json(content)
    return None


def _abandoned(path: Path) -> str | None:
    """The token in an owner's file whose owner is no more; None if there is an owner, or no
    file."""
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return None
    content = _content(path)
    owner = _process(content)
    lives = None if owner is None else owner.alive()
    if lives is None:
        lives = _now(path.parent) - touched <= STALE_S
    return None if lives else str(content.get("token", ""))


def _now(folder: Path) -> float:
    """The time by the clock that the file system goes by."""
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    file = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        return os.fstat(file).st_mtime
    finally:
        os.close(file)
        os.unlink(probe)


def _removed(path: Path, token: str) -> bool:
    """Removes an owner's file with this token; whether it was us who did, and it was that one."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    if _token_in(path) != token:
        return False
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    taken = _token_in(aside) == token
    if not taken:  # another one took it over before us: what we have is its own
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    return taken
