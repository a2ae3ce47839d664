"""A command whose output is a file: run in time, and taken no further than it may be long."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 1 << 20
_WITH_GUARD = """exec 3<&0
{ read -r line <&3; kill -KILL 0; } &
exec "$@" 3<&- </dev/null"""
"""A shell that starts a command, and kills it, and what it started, when its input ends."""
_SAID = 1 << 14
"""Bytes of its last words that are kept."""


def check_length(length: int, most: int) -> None:
    """Raises ValueError for a file that is longer than it may be."""
    if length > most:
        raise ValueError(f"it is longer than the {most} bytes that it may have")


def run_command(command: list[str], path: Path, timeout_s: float, most: int) -> None:
    """Runs a command and keeps what it prints. What it has started ends with it, and all of that
    with this process.

    Raises:
        OSError: it cannot be run, fails, or takes longer than it may.
        ValueError: it prints more than `most` bytes.
    """
    process = subprocess.Popen(
        ["sh", "-c", _WITH_GUARD, "sh", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that all it starts can be ended with it
    )
    length, said = 0, b""
    try:
        with process, open(path, "wb") as output:
            for stream, block in _blocks(process, time.monotonic() + timeout_s):
                if stream == "stderr":
                    said = (said + block)[-_SAID:]
                    continue
                length += len(block)
                check_length(length, most)
                output.write(block)
    except TimeoutError:
        raise TimeoutError(f"{command[0]} has not ended after {timeout_s:g} s") from None
    if process.returncode:
        last = "".join(said.decode(errors="replace").strip().splitlines()[-1:])
        raise OSError(f"{command[0]} ended with status {process.returncode}: {last}")


def _blocks(process: subprocess.Popen[bytes], deadline: float) -> Iterator[tuple[str, bytes]]:
    """What a process writes, as it comes, until it has ended; what is still alive of it is killed
    in the end. Raises TimeoutError at the deadline."""
    try:
        with selectors.DefaultSelector() as selector:
            for name in ("stdout", "stderr"):
                selector.register(getattr(process, name), selectors.EVENT_READ, name)
            while selector.get_map():
                ready = selector.select(min(0.1, max(0.0, deadline - time.monotonic())))
                if time.monotonic() > deadline:
                    raise TimeoutError
                if not ready and process.poll() is not None:
                    return  # something that it left behind holds its output open
                for key, _ in ready:
                    if block := os.read(key.fd, _BLOCK):
                        yield key.data, block
                    else:
                        selector.unregister(key.fileobj)
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
