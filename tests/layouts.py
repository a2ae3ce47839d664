"""Random structures, written in every layout of files that the readers know."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import ase.db
import ase.io
import numpy as np
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp import Poscar

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.storage.dataset import DatasetWriter

SYMBOLS = ("Li", "O", "Fe", "Sr", "Ti", "Cl", "H", "Kr", "Tb", "Pu")
N = 5


def make_structure(rng: np.random.Generator, size: int | None = None) -> Structure:
    """A random structure in a skewed cell, with atoms apart, as pymatgen holds it."""
    n = size or int(rng.integers(1, 7))
    grid = np.array(np.unravel_index(rng.choice(8, n, replace=False), (2, 2, 2))).T / 2
    frac = grid + rng.uniform(-0.1, 0.1, (n, 3))
    lattice = Lattice.from_parameters(*rng.uniform(5, 8, 3), *rng.uniform(75, 105, 3))
    return Structure(lattice, rng.choice(SYMBOLS, n).tolist(), frac)


def labels(i: int) -> dict[str, float]:
    return {"e_form": i - 2.5}


def ids() -> list[str]:
    return [f"c{i}" for i in range(N)]


def assert_same(found: Crystal, structure: Structure, tolerance: float = 1e-6) -> None:
    """Equal up to the order of atoms."""
    wanted = Crystal.from_pymatgen(structure)
    np.testing.assert_allclose(found.lattice, wanted.lattice, atol=tolerance)

    def rows(crystal: Crystal) -> np.ndarray:
        frac = crystal.frac_coords.round(5) % 1
        table = np.column_stack([crystal.numbers, frac])
        return table[np.lexsort(table.T[::-1])]

    np.testing.assert_allclose(rows(found), rows(wanted), atol=2e-5)


def write_text(path: Path, text: str) -> None:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        file.write(text)


def cif(structure: Structure) -> str:
    return str(CifWriter(structure))


def write_table(path: Path, header: list[str], rows: list[list]) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())
    return path


def jarvis_atoms(structure: Structure, cartesian: bool) -> dict:
    return {
        "lattice_mat": structure.lattice.matrix.tolist(),
        "coords": (structure.cart_coords if cartesian else structure.frac_coords).tolist(),
        "elements": [s.specie.symbol for s in structure],
        "cartesian": cartesian,
        "props": [""] * len(structure),
    }


# One writer per layout: (folder, structures) -> input, format that is guessed, labelled or not.


def csv_cdvae(folder, structures):
    rows = [[i, f"c{i}", "NaCl", cif(s), i - 2.5] for i, s in enumerate(structures)]
    header = ["", "material_id", "pretty_formula", "cif", "e_form"]
    return write_table(folder / "train.csv.gz", header, rows), "csv", True


def csv_poscar(folder, structures):
    rows = [[f"c{i}", str(Poscar(s.get_sorted_structure()))] for i, s in enumerate(structures)]
    return write_table(folder / "x.csv", ["id", "poscar"], rows), "csv", False


def csv_oqmd(folder, structures):
    rows = []
    for i, s in enumerate(structures):
        sites = [f"{x.specie.symbol} @ {' '.join(map(repr, x.frac_coords.tolist()))}" for x in s]
        rows.append([f"c{i}", str(s.lattice.matrix.tolist()), str(sites), i - 2.5])
    header = ["entry_id", "unit_cell", "sites", "e_form"]
    return write_table(folder / "oqmd.csv", header, rows), "csv", True


def json_oqmd(folder, structures):
    records = []
    for i, s in enumerate(structures):
        sites = [f"{x.specie.symbol} @ {' '.join(map(repr, x.frac_coords.tolist()))}" for x in s]
        cell = s.lattice.matrix.tolist()
        records.append({"entry_id": f"c{i}", "unit_cell": cell, "sites": sites} | labels(i))
    page = {"links": {"next": None}, "data": records, "meta": {"more_data_available": False}}
    write_text(folder / "oqmd.json", json.dumps(page))
    return folder / "oqmd.json", "json", True


def json_jarvis(folder, structures):
    records = [
        {"jid": f"c{i}", "atoms": jarvis_atoms(s, i % 2 == 0), "efg": [[1, 2]]} | labels(i)
        for i, s in enumerate(structures)
    ]
    with zipfile.ZipFile(folder / "jdft.json.zip", "w") as archive:
        archive.writestr("jdft_3d.json", json.dumps(records))
    return folder / "jdft.json.zip", "json", True


def json_megnet(folder, structures):
    records = [
        {"material_id": f"c{i}", "structure": cif(s)} | labels(i) for i, s in enumerate(structures)
    ]
    write_text(folder / "mp.2018.6.1.json.gz", json.dumps(records, indent=1))
    return folder / "mp.2018.6.1.json.gz", "json", True


def json_matbench(folder, structures):
    table = {
        "index": ids(),
        "columns": ["structure", "e_form"],
        "data": [[s.as_dict(), i - 2.5] for i, s in enumerate(structures)],
    }
    write_text(folder / "matbench_x.json.gz", json.dumps(table))
    return folder / "matbench_x.json.gz", "json", True


def json_mapping(folder, structures):
    content = {f"c{i}": s.as_dict() for i, s in enumerate(structures)}
    write_text(folder / "all.json", json.dumps(content))
    return folder / "all.json", "json", False


def json_lines(folder, structures):
    lines = [
        json.dumps({"id": f"c{i}", "structure": s.as_dict()} | labels(i))
        for i, s in enumerate(structures)
    ]
    write_text(folder / "all.jsonl.gz", "\n".join(lines))
    return folder / "all.jsonl.gz", "json", True


def files(folder, structures, table=True):
    folder.mkdir(exist_ok=True)
    for i, s in enumerate(structures):
        if i % 2:
            (folder / f"c{i}.cif").write_text(cif(s))
        else:
            (folder / f"c{i}.vasp").write_text(str(Poscar(s.get_sorted_structure())))
    if table:
        lines = [f"c{i}{('', '.cif' if i % 2 else '.vasp')[i < 3]}, {i - 2.5}\n" for i in range(N)]
        (folder / "id_prop.csv").write_text("".join(lines))
    return folder


def folder_labelled(folder, structures):
    return files(folder / "cifs", structures), "folder", True


def folder_plain(folder, structures):
    return files(folder / "cifs", structures, table=False), "folder", False


def folder_of_folders(folder, structures):
    for i, s in enumerate(structures):
        (folder / "runs" / f"c{i}").mkdir(parents=True)
        Poscar(s.get_sorted_structure()).write_file(folder / "runs" / f"c{i}" / "POSCAR")
    return folder / "runs", "folder", False


def archive_zip(folder, structures):
    path = folder / "cifs.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(files(folder / "cifs", structures).iterdir()):
            archive.write(file, f"data/{file.name}")
    return path, "folder", True


def archive_tar(folder, structures):
    path = folder / "cifs.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(files(folder / "cifs", structures), "cifs")
    return path, "folder", True


def extxyz(folder, structures):
    path = folder / "frames.extxyz.gz"
    text = io.StringIO()
    for i, s in enumerate(structures):
        atoms = s.to_ase_atoms()
        atoms.info = {"material_id": f"c{i}"} | labels(i)
        ase.io.write(text, atoms, format="extxyz")
    write_text(path, text.getvalue())
    return path, "extxyz", True


def ase_database(folder, structures):
    with ase.db.connect(folder / "all.db") as database:
        for i, s in enumerate(structures):
            database.write(s.to_ase_atoms(), material_id=f"c{i}", **labels(i))
    return folder / "all.db", "ase-db", True


def gnome(folder, structures):
    (folder / "gnome").mkdir()
    rows = [["Na", f"c{i}", i - 2.5] for i in range(N)]
    write_table(
        folder / "gnome" / "stable_materials_summary.csv",
        ["Composition", "MaterialId", "e_form"],
        rows,
    )
    with zipfile.ZipFile(folder / "gnome" / "by_id.zip", "w") as archive:
        for i, s in enumerate(structures):
            archive.writestr(f"by_id/c{i}.CIF", cif(s))
    return folder / "gnome", "gnome", True


def supercon3d(folder, structures):
    (folder / "sc" / "cif").mkdir(parents=True)
    rows = [[f"c{i}.cif", 10 + i, "others", "X", "order"] for i in range(N)]
    write_table(folder / "sc" / "all.csv", ["", "tc", "family", "cf", "order"], rows)
    for i, s in enumerate(structures):
        (folder / "sc" / "cif" / f"c{i}.cif").write_text(cif(s))
    return folder / "sc", "supercon3d", False


def shards(folder, structures):
    with DatasetWriter(folder / "data", ["e_form"]) as writer:
        for i, s in enumerate(structures):
            writer.add("train", Crystal.from_pymatgen(s, f"c{i}", labels(i)))
        writer.finish({})
    return folder / "data", "shards", True


LAYOUTS = [
    csv_cdvae, csv_poscar, csv_oqmd, json_oqmd, json_jarvis, json_megnet, json_matbench,
    json_mapping, json_lines, folder_labelled, folder_plain, folder_of_folders, archive_zip,
    archive_tar, extxyz, ase_database, gnome, supercon3d, shards,
]  # fmt: skip
