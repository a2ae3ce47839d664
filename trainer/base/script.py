"""How a launch script ends: errors in one line, interrupts that say what the same command does, and
the exit codes of docs/cluster.md."""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from crysforge.datapipe.common.escape import printable
from crysforge.datapipe.storage.remote import DISK_FULL
from crysforge.trainer.base.signals import INTERRUPTED, REQUEUE, Stopped, stopping

STARTS_ANEW = "nothing is written; the same command starts anew"
CONTINUES = "the same command continues"
"""What the same command does after an interrupt."""

EXPLANATIONS: list[Callable[[Exception], Exception | None]] = []
"""What modules that are imported know of errors of the libraries they use: what to tell a user, or
None."""


def run(
    main: Callable[[], Any],
    ended: Callable[[Exception | None, int], None] = lambda *_: None,
    again: Callable[[], str] = lambda: STARTS_ANEW,
) -> None:
    """Runs a launch script: a user's error is one line on stderr and exit code 2; a connection or
    process that was lost, which the same command may find again, is one with exit code 1. After
    Ctrl-C, and a signal that a scheduler sends, a line says what the same command does then; the
    exit codes are 130 and 75.

    `CRYSFORGE_TRACEBACK=1` shows the traceback as well.

    Args:
        ended: gets the error that ends the process, or None, and the exit code.
        again: what the same command does after the script was stopped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without Å must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with stopping():
            main()
    except (KeyboardInterrupt, Stopped) as stop:
        interrupted = isinstance(stop, KeyboardInterrupt)
        how = "interrupted" if interrupted else f"stopped by {stop}"
        print(f"\n{how}: {again()}", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED if interrupted else REQUEUE) from None
    except Exception as found:
        error = _in_words(found) if isinstance(found, RuntimeError | MemoryError) else found
        if not isinstance(error, ValueError | OSError):
            ended(found, 1)
            raise
        if os.environ.get("CRYSFORGE_TRACEBACK"):
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in DISK_FULL and error.filename is None:
            error = OSError("the disk that the output is written to is full: free some space")
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        lost = isinstance(error, ConnectionError | ChildProcessError | TimeoutError)
        ended(error, 1 if lost else 2)
        raise SystemExit(1 if lost else 2) from None
    finally:
        ended(None, 0)


def _in_words(error: RuntimeError | MemoryError) -> Exception | None:
    """What to tell a user of a lost process, or of memory that does not suffice."""
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        asked = re.search(r"tried to allocate (\d+) bytes", text)
        more = f" for {int(asked[1]) / 1e9:.3g} GB more" if asked else ""
        return ValueError(
            f"this machine has not enough memory{more}: lower the batch size, loader.max_atoms or "
            "the size of the model"
        )
    return next((found for known in EXPLANATIONS if (found := known(error))), None)
