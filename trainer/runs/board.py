"""Curves for TensorBoard, in a file that a full disk cannot spoil."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """An event file of scalars in a directory.

    TensorBoard's own writer works in a thread, which prints its traceback and is of no use from the
    first write on that fails. This one writes in the caller's: what cannot be written raises and
    leaves nothing behind, and the next call goes on in the same file.

    Args:
        directory: of the event files, made with the first scalars; the one above it is there.
        purge_step: what earlier files say of this step and later ones is not shown.
    """

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = directory / name
        self._purge_step = purge_step
        self._file: io.FileIO | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds named values at a step. Raises OSError if they cannot be written."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        if self._file is None:
            self._open()
        self._append({"step": step, "summary": Summary(value=shown)})

    def close(self) -> None:
        """Ends the file."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self.path.parent.mkdir(exist_ok=True)  # but no run that was deleted
        self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115
        begin: list[dict[str, Any]] = [{"file_version": "brain.Event:2"}]
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            begin.append({"step": self._purge_step, "session_log": start})
        try:
            self._append(*begin)
        except OSError:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise

    def _append(self, *events: Mapping[str, Any]) -> None:
        """Writes events whole, or not at all."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None
        records, whole = io.BytesIO(), self._file.tell()
        for event in events:
            record = Event(wall_time=time.time(), **event)
            RecordWriter(records).write(record.SerializeToString())
        data = records.getvalue()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(whole)
            self._file.seek(whole)
            raise
