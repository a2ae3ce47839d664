"""`prepare`: files in, a whole data set out; what is dropped is listed."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Structure

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.preparing.write import summary
from crysforge.datapipe.storage.manifest import SPLITS, Manifest
from tests.tables import config, contents, dropped, leftovers, read, rows, write


def test_csv_comes_back_as_pymatgen_reads_it(tmp_path, source, cifs):
    manifest = prepare(config(input=source, output=str(tmp_path / "out"), units={"gap": "eV"}))
    found = read(tmp_path / "out")
    assert manifest.splits == {"train": 32, "val": 4, "test": 4}
    by_id = {c.id: c for crystals in found.values() for c in crystals}
    assert set(by_id) == {f"mp-{i}" for i in range(40)}
    for i, text in enumerate(cifs):
        wanted = Crystal.from_pymatgen(Structure.from_str(text, fmt="cif"))
        crystal = by_id[f"mp-{i}"]
        assert crystal.numbers.tolist() == wanted.numbers.tolist()
        np.testing.assert_allclose(crystal.frac_coords, wanted.frac_coords, atol=1e-12)
        np.testing.assert_allclose(crystal.lattice, wanted.lattice, atol=1e-12)
        assert crystal.targets == {"gap": pytest.approx(0.1 * i)}
    labels = [c.targets["gap"] for c in found["train"]]
    assert manifest.targets["gap"].mean == pytest.approx(np.mean(labels))
    assert manifest.targets["gap"].std == pytest.approx(np.std(labels))
    assert manifest.targets["gap"].unit == "eV"
    assert dropped(tmp_path / "out") == []
    assert leftovers(tmp_path) == ["all.csv", "out"]


def test_processes_change_no_byte(tmp_path, cifs):
    table = rows(cifs, 200)
    table[17][1] = "broken"
    table[150][2] = "text"
    source = write(tmp_path / "all.csv", table)
    for workers in (1, 2, 3):
        out = str(tmp_path / f"out{workers}")
        prepare(config(input=source, output=out, workers=workers, shard_size=50))
    serial = contents(tmp_path / "out1")
    assert serial == contents(tmp_path / "out2") == contents(tmp_path / "out3")
    assert len(serial) > 5


def test_dropped_are_listed_and_counted(tmp_path, cifs):
    table = rows(cifs)
    table[0][1] = "nonsense"
    table[1][1] = cifs[1].replace("  1\n", "  0.5\n")
    table[2][2] = "high"
    table[3][0] = "mp-4"
    table[4][2] = ""
    table[5][2] = "na"
    table[6][1] = cifs[0].replace("  Sr  Sr0", "  Q  Q0")
    source = write(tmp_path / "all.csv", table)
    out = tmp_path / "out"
    filters = Filters(labels={"gap": [None, 3.75]})
    manifest = prepare(config(input=source, output=str(out), filters=filters))
    listed = {r["id"]: r for r in dropped(out)}
    assert {k: r["reason"] for k, r in listed.items()} == {
        "mp-0": "unreadable",
        "mp-1": "partial occupancy",
        "mp-2": "bad label",
        "mp-4": "duplicate id",
        "mp-6": "unknown element",
        "mp-38": "gap out of range",
        "mp-39": "gap out of range",
    }
    assert listed["mp-4"]["source"] == "all.csv row 5"
    assert "'high'" in listed["mp-2"]["message"]
    provenance = manifest.provenance
    assert provenance["dropped"]["gap out of range"] == 2
    assert provenance["records"] == 40 and provenance["kept"] == 33
    assert sum(manifest.splits.values()) == 33
    assert sum(manifest.targets["gap"].labelled.values()) == 32  # mp-5 is kept without
    assert provenance["filters"] == {"min_distance": 0.5, "labels": {"gap": [None, 3.75]}}
    text = summary(manifest, str(out))
    assert "dropped 7: 2 gap out of range, 1 bad label" in text
    assert "32 labelled, 1 unlabelled" in text


def test_filter_moves_nothing_between_splits(tmp_path, source):
    for name, filters in (("a", Filters()), ("b", Filters(deny=["Ba"]))):
        prepare(config(input=source, output=str(tmp_path / name), filters=filters))
    everything, filtered = read(tmp_path / "a"), read(tmp_path / "b")
    for split in SPLITS:
        kept = [c.id for c in everything[split] if 56 not in c.numbers]
        assert [c.id for c in filtered[split]] == kept
    assert sum(map(len, filtered.values())) < 40


def test_chosen_filters_are_no_errors(tmp_path, source):
    filters = Filters(deny=["Ba"])
    out = str(tmp_path / "out")
    manifest = prepare(config(input=source, output=out, filters=filters, on_bad="error"))
    assert manifest.provenance["dropped"] == {"element not wanted": 13}


def test_unlabelled_set_for_pretraining(tmp_path, source):
    manifest = prepare(config(input=source, output=str(tmp_path / "out"), targets=[]))
    assert manifest.targets == {} and sum(manifest.splits.values()) == 40


def test_damaged_shard_is_dropped_by_name(tmp_path, source):
    prepare(config(input=source, output=str(tmp_path / "a")))
    path = tmp_path / "a" / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 0xFF
    path.write_bytes(data)
    prepare(config(input=str(tmp_path / "a"), output=str(tmp_path / "b")))
    (row,) = dropped(tmp_path / "b")
    assert row["reason"] == "damaged" and "train-000000.tar entry 0" in row["source"]


def test_provenance_identifies_the_source(tmp_path, source):
    manifest = prepare(config(input=source, output=str(tmp_path / "out")))
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert manifest.provenance["sources"] == [
        {"name": "all.csv", "format": "csv", "sha256": digest}
    ]
    assert manifest.provenance["split"] == {"rule": "ratio", "seed": 123}
    assert Manifest.load(tmp_path / "out") == manifest
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
