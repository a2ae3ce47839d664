"""What long work keeps beside its output, so that after a kill the same call goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.checked import checked
from crysforge.datapipe.common.claims import claim_directory, empty_directory
from crysforge.datapipe.common.files import remove_tree, write_text
from crysforge.datapipe.common.safe_read import parse_json

MAX_LINE = 1 << 28
"""Bytes of the longest record."""
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
        busy = f"another process is writing {self.root}: let it finish"
        self._lock = claim_directory(self.path, busy)
        identity = self.path / "identity.json"
        if not identity.is_file() or identity.read_text("utf-8") != self._identity:
            empty_directory(self.path)
            write_text(identity, self._identity)
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def remove(self) -> None:
        """Removes the directory: the work is done."""
        remove_tree(self.path)

    @classmethod
    def leave_nothing(cls, output: str | os.PathLike, purpose: str) -> None:
        """Removes what a killed process may have left beside an output that is complete."""
        root = Path(output).resolve()
        remove_tree(root.parent / f".{root.name}.{purpose}")


class Journal:
    """Records by key, appended to a file; those that were whole when a process was killed are
    there again.

    Args:
        form: of a record, see `datapipe.common.checked`; a line of another one ends the journal.

    Attributes:
        done: the records, by their key.
    """

    def __init__(self, path: Path, form: Any = Any) -> None:
        self.done: dict[str, Any] = {}
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"{path} is no regular file: remove its directory")
        self._file = open(path, "a+b")  # noqa: SIM115  (closed by `close`)
        self._file.seek(0)
        whole = 0
        while line := self._file.readline(MAX_LINE):
            if not line.endswith(b"\n"):
                break
            try:
                entry = checked(list, parse_json(line, str(path)), str(path))
                key, record = checked(str, entry[0], str(path)), checked(form, entry[1], str(path))
            except (ValueError, IndexError):  # a kill tore it, and what came after
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
