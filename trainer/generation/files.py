"""The files of generated crystals."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.io import read, write

from crysforge.datapipe.common.files import make_directory, replacing, write_text
from crysforge.datapipe.common.tables import read_rows, row_writer
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.symmetry import space_group

EXTXYZ, RANKED, FAILED = "generated.extxyz", "ranked.csv", "failed.csv"
SYMPREC = (0.01, 0.1)
"""Å: a generated crystal is nearly symmetric at best."""
COLUMNS = (
    "formula", "z", "rank", "name", "score", "scored_by", "same_as", "space_group_0.01",
    "space_group_0.1", "volume_per_atom", "shortest_distance", "training_crystal", "target", "file",
)  # fmt: skip


def frame(crystal: Crystal, info: Mapping[str, Any]) -> str:
    """A crystal as one frame of an extxyz file, to ten decimal places."""
    atoms = crystal.to_ase()
    atoms.info = {k: v for k, v in info.items() if v != ""}
    out = io.StringIO()
    write(out, atoms, format="extxyz")
    return out.getvalue()


@dataclass(frozen=True)
class RankedRow:
    """What ranked.csv says of a sample."""

    crystal: Crystal
    values: dict[str, Any]

    @property
    def stem(self) -> str:
        """Of its files."""
        plain = re.sub(r"[^A-Za-z0-9.()+-]", "_", str(self.values["name"]))[:80]
        return f"{self.values['number']:06d}-{plain}"


def describe(crystal: Crystal) -> dict[str, Any]:
    """Columns that follow from the crystal alone; what cannot be found out is left empty."""
    out: dict[str, Any] = {f"space_group_{s:g}": "" for s in SYMPREC}
    out |= {"volume_per_atom": f"{crystal.volume / len(crystal):.4f}", "shortest_distance": ""}
    with suppress(Exception):  # libraries give up on a cell in more ways than one
        out |= {f"space_group_{s:g}": space_group(crystal, s) for s in SYMPREC}
    with suppress(Exception):
        distance = shortest_distance(crystal)
        out["shortest_distance"] = f"{distance:.4f}" if math.isfinite(distance) else ""
    return out


def shortest_distance(crystal: Crystal, images: bool = True) -> float:
    """Å between the closest two atoms, an atom and its own image among them if `images` says so;
    infinite for one atom without."""
    from pymatgen.core import Lattice

    cell = Lattice(crystal.lattice)
    distances = cell.get_all_distances(crystal.frac_coords, crystal.frac_coords)
    np.fill_diagonal(distances, np.inf)
    shortest = float(distances.min())
    if images:
        shortest = min(shortest, *cell.get_lll_reduced_lattice().abc)
    return shortest


def write_rows(folder: Path, rows: Sequence[RankedRow], structures: int | None = None) -> None:
    """Writes generated.extxyz, ranked.csv and cifs/: of each of the first samples (all, unless
    `structures` says how many) the structure as it is, as a CIF and a POSCAR, and brought to its
    symmetry at 0.1 Å."""
    chosen = rows[:structures]
    with replacing(folder / EXTXYZ) as file:
        for row in rows:
            info = {k: row.values.get(k, "") for k in ("name", "formula", "z", "rank", "target")}
            file.write(frame(row.crystal, {**info, "sample": row.values["sample"]}))
    with replacing(folder / RANKED) as file:
        line = row_writer(file)
        line(COLUMNS)
        for number, row in enumerate(rows):
            file_name = f"cifs/{row.stem}.cif" if number < len(chosen) else ""
            values = {**row.values, "file": file_name}
            line([values.get(name, "") for name in COLUMNS])
    make_directory(folder / "cifs")
    for row in chosen:
        write_structure(folder / "cifs" / row.stem, row.crystal)


def write_structure(path: Path, crystal: Crystal) -> None:
    """Writes PATH.cif, PATH.vasp and PATH-symmetrised.cif; the last one is left out where no
    symmetry can be found."""
    from pymatgen.io.cif import CifWriter
    from pymatgen.io.vasp import Poscar
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        structure = crystal.to_pymatgen()
        write_text(path.with_name(f"{path.name}.cif"), str(CifWriter(structure)), durable=False)
        poscar = Poscar(structure, sort_structure=True).get_str(significant_figures=10)
        write_text(path.with_name(f"{path.name}.vasp"), poscar, durable=False)
        try:
            found = SpacegroupAnalyzer(structure, symprec=SYMPREC[-1])
            text = str(CifWriter(found.get_symmetrized_structure(), symprec=SYMPREC[-1]))
        except Exception:  # spglib finds none, in more ways than one
            return
        write_text(path.with_name(f"{path.name}-symmetrised.cif"), text, durable=False)


def write_failed(folder: Path, failed: Iterable[tuple[dict[str, Any], BadCrystal]]) -> None:
    """Writes failed.csv: samples that came to nothing, and why."""
    with replacing(folder / FAILED) as file:
        line = row_writer(file)
        line(["name", "formula", "z", "target", "why"])
        for values, error in failed:
            line([*(values[k] for k in ("name", "formula", "z", "target")), str(error)])


@dataclass(frozen=True)
class Generated:
    """A generated crystal as it is read back."""

    name: str
    formula: str
    target: str
    number: int
    """Among the samples of the same question."""
    crystal: Crystal


def read_samples(folder: Path) -> tuple[list[Generated], int]:
    """The crystals in a folder that `generate` wrote, and how many came to nothing.

    Raises:
        ValueError: it holds none.
    """
    if not (folder / EXTXYZ).is_file():
        raise ValueError(f"{folder} holds no {EXTXYZ}: give the output of launch/generate.py")
    out = []
    for number, atoms in enumerate(read(folder / EXTXYZ, index=":", format="extxyz")):
        info = atoms.info
        name = str(info.get("name", number))
        crystal = Crystal.from_ase(atoms, name)
        formula, target = (str(info.get(k, "")) for k in ("formula", "target"))
        out.append(Generated(name, formula, target, int(info.get("sample", 0)), crystal))
    failed = 0
    if (folder / FAILED).is_file():
        failed = sum(1 for _ in read_rows(folder / FAILED))
    return out, failed
