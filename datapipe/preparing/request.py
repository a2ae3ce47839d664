"""What a command was asked for, as a hash: one that was killed when its work was done finds out so
when it is given again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crysforge.datapipe.storage.manifest import MANIFEST, Manifest

HOW = ("output", "workers", "progress", "dry_run", "overwrite")
"""Settings that change nothing in what is made."""


def request_of(config: Any, facts: Any, leave_out: Collection[str] = HOW) -> str:
    """Identifies what is asked for: 32 hexadecimal digits.

    Args:
        config: dataclass of settings. facts: JSON values that say what is in the files they name.
        leave_out: names of settings that change nothing.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in leave_out}
    text = json.dumps([type(config).__name__, settings, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def made_before(root: str | os.PathLike, request: str) -> Manifest | None:
    """The data set at `root`, if it is there whole and is what is asked for."""
    if not (Path(root) / MANIFEST).is_file():
        return None
    try:
        manifest = Manifest.load(root)
    except ValueError:  # whoever wants to write there says what is wrong
        return None
    if manifest.provenance.get("request") != request:
        return None
    (Path(root) / "lock").unlink(missing_ok=True)  # of a writer that was killed at the very end
    return manifest
