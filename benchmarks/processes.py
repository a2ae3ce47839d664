"""What the kernel says of processes."""

from __future__ import annotations

from pathlib import Path


def resident(kind: str, process: str = "self") -> int:
    """Bytes of memory that a process has (`VmRSS`), or had most of (`VmHWM`)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(kind)).split()[1])
