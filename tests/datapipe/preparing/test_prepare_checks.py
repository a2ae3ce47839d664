"""`prepare` with files that contradict themselves, hold several structures, or are not UTF-8."""

import csv
import gzip
from pathlib import Path

import pytest

from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.duplicates.records import Duplicates
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.preparing.write import summary
from crysforge.datapipe.storage.dataset import Dataset
from tests.cif_cases import FM3M, NACL, A, block, formula
from tests.tables import dropped

GOOD = block(FM3M, A, NACL)
BAD = block(formula("Na Cl", 2), FM3M, A, NACL)


def made(source: Path, output: Path, **settings) -> Dataset:
    """The data set that `prepare` makes of a folder or file, all of it for training."""
    settings = {"ratio": [1.0, 0.0, 0.0], "workers": 2, "progress": False, **settings}
    prepare(PrepareConfig(input=str(source), output=str(output), **settings))
    return Dataset.open(output)


def ids(data: Dataset) -> list[str]:
    return [crystal.id for _, crystal in data.read(range(len(data)))]


def warnings(output: Path) -> list[list[str]]:
    with open(output / "warnings.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.cif").write_text(BAD)
    (tmp_path / "in" / "good.cif").write_text(GOOD)
    (tmp_path / "in" / "odd.cif").write_bytes(GOOD.replace("x\n", "x # é\n", 1).encode("latin-1"))
    return tmp_path / "in"


def test_a_contradiction_is_dropped_and_latin_1_said(folder, tmp_path):
    data = made(folder, tmp_path / "out")
    assert ids(data) == ["good", "odd"]
    (row,) = dropped(tmp_path / "out")
    assert row["id"] == "bad" and "Z is 2" in row["message"]
    assert warnings(tmp_path / "out")[1:] == [
        ["odd", "line 1 is not UTF-8: the text was read as Latin-1"]
    ]
    assert "1 read with a warning (see warnings.csv)" in summary(data.manifest, "out")


@pytest.mark.parametrize("duplicates", [Duplicates(), Duplicates(within=True)])
def test_checks_warn_keeps_it_and_says_so(folder, tmp_path, duplicates):
    made(folder, tmp_path / "out", checks="warn", duplicates=duplicates)
    rows = warnings(tmp_path / "out")
    assert [row[0] for row in rows[1:]] == ["bad", "odd"]
    assert "Z is 2, but the atoms Na4 Cl4 are 4 formula units" in rows[1][1]


def test_without_a_warning_there_is_no_file(folder, tmp_path):
    made(folder / "good.cif", tmp_path / "out")
    assert not (tmp_path / "out" / "warnings.csv").exists()


def test_checks_are_strict_or_warn():
    with pytest.raises(ValueError, match="checks must be strict or warn, got 'lax'"):
        PrepareConfig(checks="lax")


def test_every_structure_of_a_file_is_a_record(tmp_path):
    text = GOOD + "data_powder\n_pd_meas_2theta 5\n" + GOOD.replace("data_x", "data_y") + GOOD
    (tmp_path / "all.cif.gz").write_bytes(gzip.compress(text.encode()))
    data = made(tmp_path / "all.cif.gz", tmp_path / "out", cell="as_is")
    assert ids(data) == ["all-x", "all-y", "all-x-2"]
    assert all(len(crystal) == 8 for _, crystal in data.read(range(3)))


def test_in_a_folder_several_structures_are_refused_with_their_number(folder, tmp_path):
    (folder / "two.cif").write_text(GOOD + GOOD.replace("data_x", "data_y"))
    made(folder, tmp_path / "out")
    (row,) = [row for row in dropped(tmp_path / "out") if row["id"] == "two"]
    assert "holds 2 structures (x, y)" in row["message"]


@pytest.mark.parametrize("name", ["a.cif", "a.mcif", "b.CIF"])
def test_a_single_file_keeps_its_name(tmp_path, name):
    (tmp_path / name).write_text(GOOD)
    assert ids(made(tmp_path / name, tmp_path / "out")) == [name[0]]


def test_a_broken_file_is_dropped_with_its_name(tmp_path):
    (tmp_path / "a.cif").write_text(GOOD.replace("'F m -3 m'", "'F m -3 m"))
    with pytest.raises(ValueError, match=r"a\.cif.*the CIF is broken: line 2"):
        made(tmp_path / "a.cif", tmp_path / "out")
