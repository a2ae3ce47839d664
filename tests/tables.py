"""Tables of crystals to prepare, and what is found in the data sets made of them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import SPLITS

HEADER = ["material_id", "cif", "gap", "formula"]


def structure(i: int) -> Structure:
    """Distinct perovskites with a little disorder in the positions."""
    rng = np.random.default_rng(i)
    frac = np.array([[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    lattice = Lattice.from_parameters(*rng.uniform(4, 5, 3), *rng.uniform(80, 100, 3))
    species = [("Sr", "Ba", "Ca")[i % 3], ("Ti", "Zr")[i % 2], "O", "O", "O"]
    return Structure(lattice, species, frac + rng.uniform(-0.03, 0.03, frac.shape))


def make_cifs() -> list[str]:
    return [str(CifWriter(structure(i))) for i in range(40)]


def write(path: Path, rows: list[list], header: list[str] = HEADER) -> str:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def rows(cifs: list[str], n: int = 40) -> list[list]:
    return [[f"mp-{i}", cifs[i % len(cifs)], 0.1 * i, "X"] for i in range(n)]


def config(**values) -> PrepareConfig:
    given = {"workers": 1, "progress": False, "targets": ["gap"], "cell": "as_is"}
    return PrepareConfig(**given | values)


def read(path: Path) -> dict[str, list[Crystal]]:
    dataset = Dataset.open(path)
    found = {s: [c for _, c in dataset.read(dataset.split_items(s))] for s in SPLITS}
    assert all(isinstance(c, Crystal) for crystals in found.values() for c in crystals)
    return found


def dropped(path: Path) -> list[dict[str, str]]:
    with open(path / "dropped.csv", newline="") as file:
        return list(csv.DictReader(file))


def leftovers(folder: Path, *known: str) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in known)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
