"""Twelve salts as CIF files, and the layouts in which people keep them with their labels."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.sources import Failure, Options, read_crystals
from crysforge.datapipe.sources.parse import parse

CASES = Path(__file__).parent / "data" / "cases" / "layouts"
N = 12
GAPS = [round(-3 + 0.21 * i, 2) for i in range(N)]
TEXTS = [(CASES / "salts" / f"salt{i}.cif").read_text() for i in range(N)]


def put(folder: Path, name: str = "salt{}.cif", count: int = N) -> Path:
    """Writes the salts into a folder, under names that have their number."""
    for i in range(count):
        path = folder / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CASES / "salts" / f"salt{i}.cif", path)
    return folder


def table(
    rows: Iterable[Sequence], header: Sequence[str] = (), separator: str = ",", end: str = "\r\n"
) -> str:
    """Rows as text, quoted where they must be."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=end)
    writer.writerows([*([header] if header else []), *rows])
    return text.getvalue()


def read(path: Path, targets: Sequence[str] = ("gap",), **options) -> list[Crystal | Failure]:
    """All that is read of an input."""
    made = Options(targets=tuple(targets), wanted=tuple(targets), **options)
    return list(read_crystals(str(path), targets=targets, options=made, workers=1))


def labelled(path: Path, targets: Sequence[str] = ("gap",), **options) -> dict[str, float]:
    """The first label by id, after a check that each crystal is the salt of its label."""
    found = {}
    for item in read(path, targets, **options):
        assert isinstance(item, Crystal), str(item)
        label = item.targets[targets[0]]
        if label == label:
            assert sorted(item.numbers.tolist()) == salt(round((label + 3) / 0.21)), (
                item.id,
                label,
            )
        found[item.id] = label
    return found


def salt(i: int) -> list[int]:
    """Atomic numbers of a salt, ascending; they differ from all others'."""
    return _NUMBERS[i]


_NUMBERS = [sorted(parse(("text", text)).numbers.tolist()) for text in TEXTS]
GAP_OF = {f"salt{i}": gap for i, gap in enumerate(GAPS)}
