"""How every benchmark shows what it found: a Markdown table, and its JSON as the last line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def markdown(rows: Sequence[Mapping[str, Any]], digits: int = 4) -> str:
    """Rows of equal keys as a Markdown table; floats have so many significant digits, and None is
    an empty cell."""
    lines = [list(rows[0]), ["---"] * len(rows[0])] if rows else []
    lines += [[_cell(v, digits) for v in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Prints the table, and `about` and the rows as one line of JSON."""
    print(markdown(rows))
    print(json.dumps({**about, "rows": list(rows)}))


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return "" if value is None else str(value)
