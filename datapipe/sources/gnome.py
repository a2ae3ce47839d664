"""GNoME's release: a summary CSV beside a zip of CIFs."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from crysforge.datapipe.sources.base import NO, SOURCES, SURE, Look, Options, Raw
from crysforge.datapipe.sources.texts import open_text

_KEYS = ("MaterialId", "Reduced Formula", "Composition")
"""Columns that name the CIF of a row, one for each of the zips that are offered."""
_ZIPS = ("by_id.zip", "by_reduced_formula.zip", "by_composition.zip")


def _likes(look: Look) -> int:
    if look.path.is_dir():
        zips = any(n.rsplit("/", 1)[-1] in _ZIPS for n in look.names)
        return SURE if zips and any(_is_summary(n) for n in look.names) else NO
    return SURE if _is_summary(look.path.name) and "MaterialId" in look.columns else NO


def _is_summary(name: str) -> bool:
    return "summary" in name.lower() and name.lower().endswith((".csv", ".csv.gz"))


@SOURCES.register("gnome", _likes)
def read_gnome(path: Path, options: Options) -> Iterator[Raw]:
    """GNoME: the folder with `stable_materials_summary.csv` and `by_id.zip` (or
    `by_reduced_formula.zip`, `by_composition.zip`).

    Both are in the public bucket gs://gdm_materials_discovery/gnome_data/ (Merchant et al., Nature
    624, 80, 2023); download them by hand. Ids are `MaterialId`; the CSV's columns are labels.
    """
    if not path.is_dir():
        raise ValueError(f"{path} has no structures: give the folder with it and {_ZIPS[0]}")
    summary = next((p for p in sorted(path.rglob("*")) if _is_summary(p.name)), None)
    archive = next((p for n in _ZIPS for p in sorted(path.rglob(n))), None)
    if summary is None or archive is None:
        missing = "stable_materials_summary.csv" if summary is None else " or ".join(_ZIPS)
        raise ValueError(
            f"{path} lacks {missing}: download it from "
            "https://storage.googleapis.com/gdm_materials_discovery/gnome_data/"
        )
    with zipfile.ZipFile(archive) as opened:
        members = {
            PurePosixPath(n).stem: n for n in opened.namelist() if n.lower().endswith(".cif")
        }
    with open_text(summary) as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            where = f"{summary.name} row {number}"
            id = row.get("MaterialId") or ""
            keys = [row.get(k) for k in _KEYS]
            member = next((members[k] for k in keys if k in members), None)
            if not id:
                raise ValueError(f"{where} has no MaterialId: not a summary of GNoME")
            if member is None:
                absent = (f"{archive.name} has no CIF named {keys[0]!r}", "missing file")
                yield Raw(id, where, ("bad", absent), row)
            else:
                yield Raw(id, where, ("member", (str(archive), member)), row)
