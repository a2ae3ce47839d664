"""SuperCon3D: superconductors with structures and critical temperatures."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from crysforge.datapipe.sources.base import NO, SOURCES, SURE, Look, Options, Raw
from crysforge.datapipe.sources.texts import open_text

_COLUMNS = {"tc", "family", "order"}


def _likes(look: Look) -> int:
    if look.path.is_dir():
        return SURE if _table(look.path) else NO
    return SURE if set(look.columns) >= _COLUMNS else NO


def _table(folder: Path) -> Path | None:
    return next((p for p in sorted(folder.glob("*.csv")) if set(Look(p).columns) >= _COLUMNS), None)


@SOURCES.register("supercon3d", _likes)
def read_supercon3d(path: Path, options: Options) -> Iterator[Raw]:
    """SuperCon3D (Chen et al., NeurIPS 2024): the folder `datasets/SuperCon` of the repository
    pincher-chen/SODNet, with a table (file, `tc` in K, `family`, `cf`, `order`) and the folder
    `cif`. Add the CIFs that come from the ICSD yourself, under the names in the table.

    Labels are `tc` (K) and `log_tc`, its natural logarithm. Crystals with partial occupancy are
    dropped as such: this pipeline holds ordered structures only.
    """
    if not path.is_dir():
        raise ValueError(f"{path} has no structures: give the folder with it and the folder 'cif'")
    table = _table(path)
    if table is None:
        raise ValueError(f"{path} has no CSV with the columns {', '.join(sorted(_COLUMNS))}")
    with open_text(table) as file:
        for number, row in enumerate(csv.reader(file)):
            if number == 0:
                names = ["file", *row[1:]]
                continue
            record: dict[str, Any] = dict(zip(names, row, strict=False))
            name = record.pop("file")
            record["log_tc"] = _log(record.get("tc"))
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{table.name} row {number} names a file elsewhere: {name!r}")
            places = (table.parent / "cif" / name, table.parent / name)
            place = next((p for p in places if p.exists()), places[0])
            id = name.removesuffix(".cif")
            yield Raw(id, f"{table.name} row {number}", ("file", str(place)), record)


def _log(text: Any) -> Any:
    """Logarithm of a number; anything else stays as it is, to be reported as a bad label."""
    try:
        return math.log(float(text))
    except (TypeError, ValueError):
        return text
