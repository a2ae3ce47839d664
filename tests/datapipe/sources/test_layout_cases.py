"""The layouts in which people keep crystals and labels: the shared cases, whole."""

import gzip
import math
import shutil

import pytest

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.prepare import prepare
from tests.salts import CASES, GAP_OF, GAPS, TEXTS, N, labelled, put, read
from tests.tables import config


def case(tmp_path, name):
    """The tables of a case beside the salts."""
    return shutil.copytree(CASES / name, put(tmp_path / name), dirs_exist_ok=True)


def test_a_header_and_two_labels(tmp_path):
    folder = case(tmp_path, "idprop_header_two")
    assert labelled(folder) == GAP_OF
    by_second = labelled(folder, ["gap", "e_form"])
    assert by_second == GAP_OF
    assert [c.targets["e_form"] for c in read(folder, ["e_form"])] == pytest.approx(
        [gap + 1 for gap in GAPS]
    )


def test_words_for_missing_labels(tmp_path):
    found = {c.id: c.targets["gap"] for c in read(case(tmp_path, "idprop_nan_words"))}
    assert len(found) == N
    measured = {id: x for id, x in found.items() if math.isfinite(x)}
    assert measured == {"salt9": 1, "salt10": 2, "salt11": 3}


def test_tabs(tmp_path):
    assert labelled(case(tmp_path, "idprop_tab")) == GAP_OF


def test_a_table_for_each_split(tmp_path):
    folder = case(tmp_path, "idprop_train_test")
    manifest = prepare(config(input=str(folder), output=str(tmp_path / "out")))
    assert manifest.splits == {"train": 8, "val": 0, "test": 4}
    assert manifest.targets["gap"].labelled == {"train": 8, "val": 0, "test": 4}
    assert "no table is of val" in " ".join(manifest.provenance["notes"])
    mixed = prepare(config(input=str(folder), output=str(tmp_path / "mixed"), split="ratio"))
    assert mixed.splits == {"train": 10, "val": 1, "test": 1}


def test_one_name_in_many_folders(tmp_path):
    folder = put(tmp_path / "runs", "mat{}/relax/structure.cif")
    found = {c.id: c.numbers.tolist() for c in read(folder, [])}
    plain = {c.id: c.numbers.tolist() for c in read(put(tmp_path / "plain", "mat{}.cif"), [])}
    assert found == plain and len(found) == N


def test_compressed_files_within(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"salt{i}.cif.gz").write_bytes(gzip.compress(text.encode()))
    found = {c.id: c.numbers.tolist() for c in read(tmp_path, [])}
    assert found == {c.id: c.numbers.tolist() for c in read(put(tmp_path / "plain"), [])}


@pytest.mark.parametrize(
    "name",
    ["lines.json", "german.csv", "header_spaces.csv", "header_case.csv", "latin1.csv",
     "csv_with_ds.zip"],
)  # fmt: skip
def test_files_of_crystals(name):
    assert labelled(CASES / name) == GAP_OF


def test_latin_1_is_said(tmp_path):
    out = str(tmp_path / "out")
    manifest = prepare(config(input=str(CASES / "latin1.csv"), output=out))
    assert manifest.provenance["notes"] == ["latin1.csv: line 30 is not UTF-8: read as Latin-1"]


def test_paths_with_and_without_their_files(tmp_path):
    shutil.copy(CASES / "paths.csv", tmp_path)
    words = r"file names in column 'cif', and 'links_target/salt0\.cif'"
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "paths.csv")
    put(tmp_path / "links_target")
    assert labelled(tmp_path / "paths.csv") == GAP_OF
    (tmp_path / "links_target" / "salt3.cif").unlink()
    bad = [f for f in read(tmp_path / "paths.csv") if not isinstance(f, Crystal)]
    assert [(f.id, f.reason) for f in bad] == [("salt3", "missing file")]
