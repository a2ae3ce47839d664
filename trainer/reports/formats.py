"""A table and its three forms: Markdown to read, CSV to compute with, LaTeX (booktabs) to print."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crysforge.datapipe.common.escape import markdown, one_line
from crysforge.datapipe.common.files import write_text
from crysforge.datapipe.common.tables import row_writer

NOTHING = "–"


@dataclass(frozen=True)
class Number:
    """A number with the places it is shown with, and its spread where it has one."""

    value: float
    places: int = 3
    std: float = math.nan
    bold: bool = False
    suffix: str = ""
    """Shown behind it, in readable forms only."""

    @property
    def text(self) -> str:
        """As in `0.117 ± 0.002`; a dash where there is none."""
        if not math.isfinite(self.value):
            return NOTHING + self.suffix
        spread = f" ± {self.std:.{self.places}f}" if math.isfinite(self.std) else ""
        return f"{self.value:.{self.places}f}{spread}{self.suffix}"


@dataclass(frozen=True)
class Interval:
    """A range, shown as `[low, high]`."""

    low: float
    high: float
    places: int = 3

    @property
    def text(self) -> str:
        """A dash where there is none."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return NOTHING
        return f"[{self.low:.{self.places}f}, {self.high:.{self.places}f}]"


@dataclass(frozen=True)
class PValue:
    """A probability, shown with two digits that matter."""

    value: float

    @property
    def text(self) -> str:
        """A dash where there was no test."""
        if not math.isfinite(self.value):
            return NOTHING
        return "< 0.001" if self.value < 0.001 else f"{self.value:.3f}"


Entry = str | int | Number | Interval | PValue


@dataclass
class Table:
    """Rows of entries under named columns; the first `heads` columns name the rows."""

    name: str
    """Of its files."""
    title: str
    columns: list[str]
    rows: list[list[Entry]]
    heads: int = 1
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Writes NAME.md, NAME.csv and NAME.tex."""
        write_text(
            folder / f"{self.name}.md", f"# {markdown(self.title)}\n\n{self.markdown()}\n", False
        )
        write_text(folder / f"{self.name}.csv", self.csv(), False)
        write_text(folder / f"{self.name}.tex", self.latex(), False)

    def markdown(self) -> str:
        """The table and its notes; columns are padded so that it reads well as it is."""
        rows = [list(map(_markdown, row)) for row in self.rows]
        head = list(map(markdown, self.columns))
        widths = [max([3, len(c), *(len(r[i]) for r in rows)]) for i, c in enumerate(head)]
        numbers = range(self.heads, len(head))
        rule = ["-" * (w - 1) + ":" if i in numbers else "-" * w for i, w in enumerate(widths)]

        def line(cells: Sequence[str]) -> str:
            padded = (
                c.rjust(w) if i in numbers else c.ljust(w)
                for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            return f"| {' | '.join(padded)} |"

        text = "\n".join(map(line, [head, rule, *rows]))
        return "\n\n".join([text, *map(markdown, self.notes)])

    def csv(self) -> str:
        """All digits; a spread, and the ends of an interval, have columns of their own."""
        shapes = [self._shape(i) for i in range(len(self.columns))]
        file = io.StringIO()
        write = row_writer(file, lineterminator="\n")
        write([c + s for c, shape in zip(self.columns, shapes, strict=True) for s in shape])
        for row in self.rows:
            write([x for e, shape in zip(row, shapes, strict=True) for x in _plain(e, shape)])
        return file.getvalue()

    def latex(self) -> str:
        """A table environment for the booktabs package."""
        spec = "l" * self.heads + "r" * (len(self.columns) - self.heads)
        head = " & ".join(map(escape_latex, self.columns))
        body = [" & ".join(map(_latex, row)) + r" \\" for row in self.rows]
        body = [f"{{}}{line}" if line.startswith("[") else line for line in body]  # no option of \\
        caption = escape_latex(" ".join([self.title + ".", *self.notes]))
        return "\n".join(
            [
                r"% \usepackage{booktabs}",
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{caption}}}",
                rf"\label{{tab:{self.name}}}",
                rf"\begin{{tabular}}{{{spec}}}",
                r"\toprule",
                head + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def _shape(self, column: int) -> tuple[str, ...]:
        """Suffixes of the CSV columns that a column needs."""
        entries = [row[column] for row in self.rows]
        if any(isinstance(e, Interval) for e in entries):
            return (" low", " high")
        spread = any(isinstance(e, Number) and math.isfinite(e.std) for e in entries)
        return ("", " std") if spread else ("",)


def places(values: Sequence[float], digits: int = 3) -> int:
    """Decimal places that show `digits` digits of the smallest of some numbers, at most 6."""
    sizes = [abs(x) for x in values if math.isfinite(x) and x != 0]
    if not sizes:
        return digits
    return min(6, max(0, digits - 1 - math.floor(math.log10(min(sizes)))))


def _markdown(entry: Entry) -> str:
    if isinstance(entry, (str, int)):
        return markdown(str(entry))
    return f"**{entry.text}**" if isinstance(entry, Number) and entry.bold else entry.text


def _plain(entry: Entry, shape: Sequence[str]) -> list[str]:
    """An entry as cells of a CSV."""
    if isinstance(entry, Interval):
        return [_digits(entry.low), _digits(entry.high)]
    if isinstance(entry, (Number, PValue)):
        cells = [_digits(entry.value)]
        if len(shape) == 2:
            cells.append(_digits(entry.std if isinstance(entry, Number) else math.nan))
        return cells
    text = "" if entry == NOTHING else str(entry)
    return [text, *[""] * (len(shape) - 1)]


def _digits(value: float) -> str:
    return f"{value:.10g}" if math.isfinite(value) else ""


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"$<$", ">": r"$>$", "|": r"$|$", "±": r"$\pm$", "≤": r"$\le$", "≥": r"$\ge$",
    "–": "--", "−": "$-$", "²": "$^2$", "³": "$^3$", "Å": r"\AA{}", "√": r"$\surd$",
    "·": r"$\cdot$",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(c, c) for c in one_line(text))


def _latex(entry: Entry) -> str:
    if isinstance(entry, Number) and math.isfinite(entry.value):
        value = f"{entry.value:.{entry.places}f}"
        value = rf"\mathbf{{{value}}}" if entry.bold else value
        spread = rf" \pm {entry.std:.{entry.places}f}" if math.isfinite(entry.std) else ""
        return f"${value}{spread}${escape_latex(entry.suffix)}"
    if isinstance(entry, Interval) and entry.text != NOTHING:
        return f"${entry.text}$"
    return escape_latex(entry.text if not isinstance(entry, (str, int)) else str(entry))
