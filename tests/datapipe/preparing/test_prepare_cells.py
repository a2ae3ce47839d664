"""`prepare` and the cell: one for a material, on record, and labels of the cell go with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from pymatgen.io.cif import CifWriter

from crysforge.datapipe.crystals.cells import AS_GIVEN, Cells, cells_of, extensive_of
from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.crystals.per_cell import of_the_cell
from crysforge.datapipe.preparing.edit import merge, subset
from crysforge.datapipe.preparing.edit_configs import MergeConfig, SubsetConfig
from crysforge.datapipe.preparing.inspect import InspectConfig, describe, statistics
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.preparing.write import summary
from crysforge.datapipe.sources import UNITS
from crysforge.datapipe.storage.manifest import Manifest
from tests.tables import config, leftovers, read, structure, write

ROOT = Path(__file__).resolve().parents[3]
HEADER = ["material_id", "cif", "gap", "total_energy"]
SIZES = (1, 2, 4)
"""How many primitive cells the cells of the table hold, in turn."""


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    """Twelve perovskites of five atoms in cells of 5, 10 and 20, with total energies of -8 eV an
    atom."""
    rows = []
    for i in range(12):
        copies = SIZES[i % 3]
        cell = structure(i).make_supercell((copies, 1, 1), in_place=False)
        rows.append([f"mp-{i}", str(CifWriter(cell)), 0.5 * i, -40.0 * copies])
    return write(tmp_path_factory.mktemp("cells") / "all.csv", rows, HEADER)


def made(source: str, output: Path, **values) -> Manifest:
    given = {"targets": ["gap", "total_energy"], "cell": "primitive"} | values
    return prepare(config(input=source, output=str(output), **given))


def crystals(path: Path):
    return {c.id: c for found in read(path).values() for c in found}


def inspected(path: Path) -> str:
    return describe(statistics(InspectConfig(inspect=str(path), workers=1, progress=False)))


def test_cells_are_reduced_and_labels_of_the_cell_with_them(tmp_path, table):
    manifest = made(table, tmp_path / "out", extensive=["total_energy"])
    found = crystals(tmp_path / "out")
    assert {len(c) for c in found.values()} == {5}
    for i in range(12):
        assert found[f"mp-{i}"].targets == {"gap": 0.5 * i, "total_energy": pytest.approx(-40.0)}
    record = manifest.provenance
    assert record["cell"] == {"rule": "primitive", "tolerance": 0.01, "reduced": 8}
    assert record["extensive"] == ["total_energy"]
    assert "cells reduced to primitive ones: 8" in summary(manifest, "out")
    said = inspected(tmp_path / "out")
    assert "cells: primitive (0.01 Å), 8 of them reduced; total_energy went with" in said
    assert "read with checks=strict: 12 of 12 records kept, 0 dropped" in said


@pytest.mark.parametrize(("cell", "atoms"), [("as_is", {5, 10, 20}), ("niggli", {5, 10, 20})])
def test_other_cells_keep_atoms_and_labels(tmp_path, table, cell, atoms):
    manifest = made(table, tmp_path / "out", cell=cell)
    found = crystals(tmp_path / "out")
    assert {len(c) for c in found.values()} == atoms
    assert all(c.targets["total_energy"] == -8.0 * len(c) for c in found.values())
    assert manifest.provenance["cell"] == {"rule": cell, "reduced": 0}
    assert cells_of(manifest.provenance) == Cells(rule=cell)
    assert f"cells: {cell}\n" in inspected(tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_label_of_the_cell_must_be_declared(tmp_path, table, workers):
    wanted = r"mp-1.*'total_energy' may be.*\(its name says so\).*2 primitive.*extensive=\[total_en"
    with pytest.raises(ValueError, match=wanted):
        made(table, tmp_path / "out", workers=workers)
    assert leftovers(tmp_path) == []
    made(table, tmp_path / "declared", intensive=["total_energy"])
    assert {c.targets["total_energy"] for c in crystals(tmp_path / "declared").values()} == {
        -40.0, -80.0, -160.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="its unit is eV/cell"):
        made(table, tmp_path / "unit", targets=["gap"], units={"gap": "eV/cell"})
    with pytest.raises(ValueError, match="'total_energy' may be"):
        filters = Filters(labels={"total_energy": [-100.0, 0.0]})
        made(table, tmp_path / "filter", targets=["gap"], filters=filters)


def test_no_label_is_doubted_where_no_cell_changes(tmp_path):
    rows = [[f"mp-{i}", str(CifWriter(structure(i))), i, -40.0] for i in range(4)]
    double = structure(4).make_supercell((2, 1, 1), in_place=False)
    rows.append(["mp-4", str(CifWriter(double)), 4, "na"])
    manifest = made(write(tmp_path / "all.csv", rows, HEADER), tmp_path / "out", ratio=[1, 0, 0])
    assert manifest.provenance["cell"]["reduced"] == 1


def test_declarations_are_checked(table, tmp_path):
    with pytest.raises(ValueError, match=r"extensive=\[total\].*did you mean 'total_energy'"):
        made(table, tmp_path / "out", extensive=["total"])
    with pytest.raises(ValueError, match="gap is in extensive and in intensive"):
        made(table, tmp_path / "out", extensive=["gap"], intensive=["gap"])
    with pytest.raises(ValueError, match=r"unknown cell 'primitve'.*did you mean 'primitive'"):
        made(table, tmp_path / "out", cell="primitve")
    with pytest.raises(ValueError, match="cell_tolerance"):
        made(table, tmp_path / "out", cell_tolerance=1.0)


def test_sets_made_of_sets_remember(tmp_path, table):
    made(table, tmp_path / "a", extensive=["total_energy"])
    part = subset(
        SubsetConfig(
            subset=str(tmp_path / "a"), output=str(tmp_path / "b"), count=6, progress=False
        )
    )
    again = made(str(tmp_path / "b"), tmp_path / "c", cell="as_is")
    for manifest in (part, again):
        assert cells_of(manifest.provenance) == Cells()
        assert extensive_of(manifest.provenance) == ["total_energy"]
    made(table, tmp_path / "given", cell="as_is")
    sets = [str(tmp_path / name) for name in ("a", "given")]
    both = merge(
        MergeConfig(merge=sets, output=str(tmp_path / "d"), same_id="rename", progress=False)
    )
    assert cells_of(both.provenance) == AS_GIVEN
    whole = made(str(tmp_path / "d"), tmp_path / "e")
    assert (
        whole.provenance["cell"]["rule"] == "primitive" and whole.provenance["cell"]["reduced"] == 8
    )
    assert {c.targets["total_energy"] for c in crystals(tmp_path / "e").values()} == {-40.0}


OF_THE_CELL = [
    ("total_energy", "eV"), ("totalEnergy", None), ("energy", None), ("x", "eV/cell"),
    ("x", "muB/cell"), ("m", "μB"), ("Corrected Energy", "eV"), ("Volume", "A^3"), ("nsites", None),
    ("total_magnetization", None), ("magmom_oszicar", None), ("formation_energy", "eV"),
    ("formation energy (eV/unit cell)", None), ("number of atoms", None), ("cell_volume", "Å^3"),
]  # fmt: skip
OF_THE_MATERIAL = [
    ("band_gap", "eV"), ("total_energy", "eV/atom"), ("total energy (eV/atom)", None), ("tc", "K"),
    ("formation_energy", None), ("e_form", "eV"), ("fermi_energy", "eV"), ("x", "muB/f.u."),
    ("volume_per_atom", None), ("heat", "kJ/mol"), ("energy_above_hull", "eV"), ("n", None),
    ("total_magnetization_normalized_vol", None), ("log10(K_VRH)", "log10(GPa)"), ("m", "muB/atom"),
    ("surface energy", "J/m^2"), ("density", "g/cm^3"), ("polarization", "C/m^2"), ("spillage", ""),
]  # fmt: skip


def test_names_and_units_tell_whose_a_label_is():
    for name, unit in OF_THE_CELL:
        assert of_the_cell(name, unit), (name, unit)
    for name, unit in OF_THE_MATERIAL:
        assert of_the_cell(name, unit) is None, (name, unit)
    doubted = {name for name, unit in UNITS.items() if of_the_cell(name, unit)}
    assert doubted == {"Corrected Energy", "Volume"}


def test_published_protocols_keep_their_cells():
    """Those of structure prediction have Niggli cells."""
    predicted = {"carbon24", "mp20", "mpts52", "perov5"}
    for path in (ROOT / "configs" / "prepare").glob("*.yaml"):
        wanted = "niggli" if path.stem in predicted else "as_is"
        assert yaml.safe_load(path.read_text("utf-8"))["cell"] == wanted, path
    for path in (ROOT / "configs" / "suites").rglob("*.yaml"):
        data = yaml.safe_load(path.read_text("utf-8")).get("data", {})
        for name, entry in data.items():
            source = entry["source"]
            pinned = "configs/prepare/" in source or "cell=as_is" in source
            assert pinned or "launch/prepare.py" not in source, (path, name)


def test_settings_of_reading_are_those_of_predict():
    from crysforge.datapipe.preparing.config import PrepareConfig
    from crysforge.datapipe.sources.options import ReadingConfig
    from crysforge.trainer.serving.config import PredictConfig

    reading = {f.name for f in dataclasses.fields(ReadingConfig)}
    for schema in (PrepareConfig, PredictConfig):
        assert reading <= {f.name for f in dataclasses.fields(schema)}
    assert {"format", "id_column", "structure_column", "cell", "on_bad", "workers"} <= reading
