"""What long work keeps beside its output, so that after a kill the same call goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SYNC = 10.0
"""Seconds between moments when a journal is surely on the disk, not only with the system."""


class WorkDirectory:
    """The directory `.NAME.<purpose>` beside an output, for one process at a time.

        with WorkDirectory("data/mp20", "dedup", identity) as work:
            ...  # what is in work.path is still there when the same call is made after a kill
            work.remove()

    What was left by a call with another identity is discarded on entry.

    Args:
        identity: JSON values that say what is worked on and how.

    Raises:
        ValueError: another process is at the same work.
    """

    def __init__(self, output: str | os.PathLike, purpose: str, identity: Mapping) -> None:
        root = Path(output).resolve()
        self.root, self.path = root, root.parent / f".{root.name}.{purpose}"
        self._identity = json.dumps(identity, sort_keys=True, indent=1)

    def __enter__(self) -> WorkDirectory:
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / "lock"
        self._lock = open(path, "ab")
        try:
            # Unlike flock's, this lock is not inherited by worker processes that outlive a kill.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file since we opened it.
            mine = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(path))
        except (BlockingIOError, PermissionError, FileNotFoundError):
            mine = False
        if not mine:
            self._lock.close()
            raise ValueError(f"another process is writing {self.root}: let it finish")
        identity = self.path / "identity.json"
        if not identity.is_file() or identity.read_text("utf-8") != self._identity:
            for old in self.path.iterdir():
                if old.name != "lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            identity.write_text(self._identity, "utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def remove(self) -> None:
        """Removes the directory: the work is done."""
        shutil.rmtree(self.path, ignore_errors=True)

    @classmethod
    def leave_nothing(cls, output: str | os.PathLike, purpose: str) -> None:
        """Removes what a killed process may have left beside an output that is complete."""
        root = Path(output).resolve()
        shutil.rmtree(root.parent / f".{root.name}.{purpose}", ignore_errors=True)


class Journal:
    """Records by key, appended to a file; those that were whole when a process was killed are
    there again.

    Attributes:
        done: the records, by their key.
    """

    def __init__(self, path: Path) -> None:
        self.done: dict[str, Any] = {}
        self._file = open(path, "a+b")  # noqa: SIM115  (closed by `close`)
        self._file.seek(0)
        whole = 0
        for line in self._file:
            try:
                key, record = json.loads(line) if line.endswith(b"\n") else (None, None)
            except ValueError:
                key = None
            if key is None:  # a kill tore it, and what came after
                break
            self.done[key] = record
            whole += len(line)
        self._file.truncate(whole)
        self._synced = time.monotonic()

    def add(self, key: str, record: Any) -> None:
        """Appends a record; from then on a kill cannot take it."""
        self.done[key] = record
        self._file.write(json.dumps([key, record]).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC:  # against a crash of the machine
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        self._file.close()
