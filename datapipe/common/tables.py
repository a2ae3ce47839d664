"""CSV files of ours: texts are made harmless for spreadsheets on the way out, and are on the way in
what they were."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from crysforge.datapipe.common.escape import cell, from_cell
from crysforge.datapipe.common.places import own_file

MAX_TABLE = 1 << 30
"""Bytes of the longest file."""


class Writable(Protocol):
    """A text file, or what stands for one."""

    def write(self, text: str, /) -> object: ...


def row_writer(file: Writable, **how: Any) -> Callable[[Sequence[object]], object]:
    """A function that appends a row to a CSV.

    Args:
        how: as `csv.writer` takes it.
    """
    writer = csv.writer(file, **how)
    return lambda row: writer.writerow([cell(x) if isinstance(x, str) else x for x in row])


def number(text: str, path: Path) -> float:
    """The number in a cell, NaN where it is empty. Raises ValueError naming the file if there is
    none."""
    try:
        return float(text or "nan")
    except ValueError:
        raise ValueError(f"{path}: {text[:40]!r} is no number") from None


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV that `row_writer` wrote, by the names of its first line.

    Raises:
        ValueError: it is missing, a link that leads elsewhere, too long or no text; a name is there
            twice, or a row has more or fewer cells than names. One line that names the file.
    """
    if own_file(path).stat().st_size > MAX_TABLE:
        raise ValueError(f"{path} has more than {MAX_TABLE} bytes")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            names = [from_cell(x) for x in next(reader, [])]
            if len(set(names)) < len(names):
                raise ValueError(f"{path} has a column twice")
            for row in reader:
                if len(row) != len(names):
                    raise ValueError(
                        f"{path} line {reader.line_num} has {len(row)} cells, not {len(names)}"
                    )
                yield dict(zip(names, map(from_cell, row), strict=True))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table: {error}") from None
