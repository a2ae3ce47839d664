"""Tables as text: rows of cells between commas, semicolons, tabs, bars or spaces."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

from crysforge.datapipe.sources.values import has_comma, is_number, may_be_thousands

LONGEST = 1 << 26
"""Characters of the longest cell; the csv module's own limit is too small for large structures."""
_SEPARATORS = "\t;,| "
"""The likeliest first where rows can be cut in several ways."""
_SAMPLE = 50
"""Rows that a table's form is told from."""
_REGULAR = 0.9
"""Share of these rows that must be as wide as the first."""
_INVISIBLE = "\ufeff\u200b\u00a0 \t\r\n"


@dataclass(frozen=True)
class Dialect:
    """How rows are cut into cells."""

    separator: str = ","
    skip: int = 0
    """Lines before the first row."""

    def rows(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """The rows of a table from its lines, whose ends they keep; without those that are empty.

        Raises:
            csv.Error: a cell is longer than `LONGEST`, or a quote is not closed.
        """
        ended = False

        def end() -> Iterator[str]:
            nonlocal ended
            ended = True
            yield from ()

        lines = islice(lines, self.skip, None)
        if self.separator == " ":
            lines = (re.sub(r"\s+", " ", line.strip().lstrip("#")) + "\n" for line in lines)
        limit = csv.field_size_limit(LONGEST)
        try:
            reader = csv.reader(
                chain(lines, end()), delimiter=self.separator, skipinitialspace=True
            )
            start = 1
            for row in reader:
                if ended:  # in the middle of a row
                    raise csv.Error(f"the quote in the row of line {start} is not closed")
                if any(map(str.strip, row)):
                    yield row
                start = 1 + self.skip + reader.line_num
        finally:
            csv.field_size_limit(limit)


class Values:
    """Reads the labels of a table. Where commas do not separate its cells they are decimal, as in
    `-3,0`, and become points.

    Args:
        where: name of the table, for messages.
        wanted: labels that are looked at. It is an error if a comma in a column of them may stand
            for thousands: there are points as well, or none is decimal for sure.
    """

    def __init__(self, dialect: Dialect, where: str, wanted: Iterable[str] = ()) -> None:
        self._where = where
        self._commas = dialect.separator != ","
        self._seen: dict[str, dict[str, str]] = {plain(name): {} for name in wanted}
        """By column: the first numbers with a comma, with a decimal comma for sure, a point."""

    def read(self, name: str, cell: str) -> str:
        """A label of a column. Raises ValueError if its decimal sign is not that of labels before.

        Text that is no number stays as it is.
        """
        cell = clean(cell)
        if not self._commas:
            return cell
        comma = has_comma(cell)
        seen = self._seen.get(plain(name)) if comma or "." in cell else None
        if seen is not None and is_number(cell):
            seen.setdefault("comma" if comma else "point", cell)
            if comma and not may_be_thousands(cell):
                seen.setdefault("decimal", cell)
            if "comma" in seen and "point" in seen:
                raise ValueError(
                    f"{self._where}: column {name!r} has decimal commas and points "
                    f"({seen['comma']!r}, {seen['point']!r}): write all numbers in one way, "
                    "without signs for thousands"
                )
        return cell.replace(",", ".") if comma else cell

    def close(self) -> None:
        """Raises ValueError if the commas of a column may all stand for thousands."""
        for name, seen in self._seen.items():
            if "comma" in seen and "decimal" not in seen:
                raise ValueError(
                    f"{self._where}: {seen['comma']!r} in column {name!r} may be a decimal number "
                    "or thousands: write it with a point, or without a comma"
                )


def sniff(head: str, whole: bool) -> list[tuple[Dialect, list[list[str]]]]:
    """Ways to read a table, the likeliest first, each with the first rows that it gives.

    Args:
        head: start of the text. whole: whether this is all of it; else its last row may be cut.
    """
    first = re.match(r"sep=(.)[\r\n]", head)  # spreadsheets write and obey it
    separators = first[1] if first else _SEPARATORS
    found = []
    for rank, separator in enumerate(separators):
        dialect = Dialect(separator, 1 if first else _remarks(head, separator))
        rows = _sample(head, whole, dialect)
        width = len(rows[0]) if rows else 0
        regular = sum(len(trim(row, width)) == width for row in rows) / max(len(rows), 1)
        least = 1 if separator == " " else _REGULAR
        if width > 1 and regular >= least:
            found.append((-round(regular, 1), rank, dialect, rows))
    if not found:
        dialect = Dialect(",", 1 if first else _remarks(head, ","))
        return [(dialect, _sample(head, whole, dialect))]
    return [(dialect, rows) for *_, dialect, rows in sorted(found, key=lambda f: f[:2])]


def _remarks(head: str, separator: str) -> int:
    """Lines of remarks, which start with #, before a table; not a header that starts so."""
    lines = head.splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)
    if not count:
        return 0
    last = lines[count - 1].lstrip("# ")
    cells = len(last.split() if separator == " " else last.split(separator))
    row = _sample(head, False, Dialect(separator, count))[:1]
    least = 3 if separator == " " else 2  # two words are rather a remark
    return count - 1 if row and len(row[0]) == cells >= least else count


def _sample(head: str, whole: bool, dialect: Dialect) -> list[list[str]]:
    rows: list[list[str]] = []
    try:
        for row in islice(dialect.rows(io.StringIO(head, newline="")), _SAMPLE + 1):
            rows.append(row)
    except csv.Error:  # the head ends within quotes
        return rows
    cut = not whole and len(rows) <= _SAMPLE
    return rows[:-1] if cut else rows[:_SAMPLE]


def trim(row: list[str], width: int) -> list[str]:
    """A row without empty cells beyond the width of the table."""
    while len(row) > width and not row[-1].strip():
        row = row[:-1]
    return row


def clean(cell: str) -> str:
    """A cell without space, byte-order marks or quotes around it."""
    cell = cell.strip(_INVISIBLE)
    if len(cell) > 1 and cell[0] == cell[-1] and cell[0] in "'\"":
        cell = cell[1:-1].strip(_INVISIBLE)
    return cell


def header(cells: Sequence[str], where: str) -> list[str]:
    """Names of columns.

    Raises:
        ValueError: two columns have one name.
    """
    names = [clean(cell) for cell in cells]
    if names and names[0].startswith("#"):
        names[0] = names[0].lstrip("#").strip()
    for name, count in Counter(filter(None, names)).items():
        if count > 1:
            places = [str(i) for i, n in enumerate(names, start=1) if n == name]
            raise ValueError(
                f"{where} has {count} columns named {name!r} (columns {' and '.join(places)}): "
                "rename or remove one"
            )
    return names


@lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """A column's name as people remember it: in lower case, any space or line is one space."""
    return re.sub(r"[\s_]+", " ", unicodedata.normalize("NFC", clean(name))).casefold()


def same_column(name: str, names: Iterable[str]) -> str | None:
    """The column of this name; where there is none, the only one whose name differs in case, space
    and underscores alone."""
    names = list(names)
    if name in names:
        return name
    alike = [n for n in names if plain(n) == plain(name)]
    return alike[0] if len(alike) == 1 else None
