"""Names that a user typed: the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from crysforge.datapipe.common.escape import one_line


def nearest(name: str, choices: Iterable[str]) -> str:
    """A phrase that lists the choices and names the nearest one."""
    choices = sorted(choices)
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return (
        f"did you mean {match[0]!r}? " if match else ""
    ) + f"valid: {', '.join(map(one_line, choices))}"
