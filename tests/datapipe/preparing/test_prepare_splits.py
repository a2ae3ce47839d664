"""`prepare`: which records become train, val and test."""

import json
import random

import numpy as np
import pytest

from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.storage.manifest import SPLITS
from tests.tables import config, read, rows, write


def test_splits_by_file(tmp_path, cifs):
    table = rows(cifs)
    files = {s: write(tmp_path / f"{s}.csv", table[i * 10 : i * 10 + 10])
             for i, s in enumerate(SPLITS)}  # fmt: skip
    prepare(config(output=str(tmp_path / "out"), **files))
    found = read(tmp_path / "out")
    for i, split in enumerate(SPLITS):
        assert [c.id for c in found[split]] == [f"mp-{i * 10 + j}" for j in range(10)]
    del files["test"]
    manifest = prepare(config(output=str(tmp_path / "two"), **files))
    assert manifest.splits == {"train": 10, "val": 10, "test": 0}
    assert manifest.provenance["split"] == {"rule": "file"}


def test_files_without_ids_do_not_collide(tmp_path, cifs):
    header = ["cif", "gap"]
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        write(tmp_path / split / "data.csv", [r[1:3] for r in rows(cifs, 5)], header)
    paths = {s: str(tmp_path / s / "data.csv") for s in ("train", "val")}
    manifest = prepare(config(output=str(tmp_path / "out"), **paths))
    assert manifest.splits == {"train": 5, "val": 5, "test": 0}
    assert [c.id for c in read(tmp_path / "out")["val"]] == [f"val-{i}" for i in range(1, 6)]


def test_splits_by_id_list(tmp_path, source):
    lists = {"train": ["mp-3", "mp-1"], "val": ["mp-30", "absent"]}
    (tmp_path / "s.json").write_text(json.dumps(lists))
    out = tmp_path / "out"
    manifest = prepare(config(input=source, output=str(out), split_ids=str(tmp_path / "s.json")))
    found = read(out)
    assert [c.id for c in found["train"]] == ["mp-1", "mp-3"]
    assert [c.id for c in found["val"]] == ["mp-30"]
    assert manifest.provenance["dropped"] == {"in no split": 37}
    assert manifest.provenance["split"]["split_ids"]["name"] == "s.json"


def test_published_split_goes_by_present_labels(tmp_path, cifs):
    table = rows(cifs)
    unlabelled = {3, 8, 20}
    for i in unlabelled:
        table[i][2] = "na"
    source = write(tmp_path / "all.csv", table)
    prepare(config(input=source, output=str(tmp_path / "out"), split="published-123"))
    present = [i for i in range(40) if i not in unlabelled]
    order = list(range(37))
    random.seed(123)
    random.shuffle(order)
    found = read(tmp_path / "out")
    wanted = {"train": order[:29], "val": order[-6:-3], "test": order[-3:]}
    for split, chosen in wanted.items():
        assert [c.id for c in found[split]] == [f"mp-{present[i]}" for i in sorted(chosen)]


def test_published_split_needs_one_label(tmp_path, source):
    for targets in ([], ["gap", "material"]):
        settings = {"input": source, "output": str(tmp_path / "out"), "targets": targets}
        with pytest.raises(ValueError, match=r"split_target|no target 'material'"):
            prepare(config(split="published-123", **settings))


def test_data_set_is_prepared_again_with_its_splits(tmp_path, source):
    prepare(config(input=source, output=str(tmp_path / "a"), units={"gap": "meV"}))
    filters = Filters(deny=["Ca"])
    manifest = prepare(
        config(input=str(tmp_path / "a"), output=str(tmp_path / "b"), filters=filters)
    )
    assert manifest.targets["gap"].unit == "meV"
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    for split in SPLITS:
        kept = [c for c in first[split] if 20 not in c.numbers]
        assert [c.id for c in kept] == [c.id for c in second[split]]
        for one, other in zip(kept, second[split], strict=True):
            np.testing.assert_array_equal(one.frac_coords, other.frac_coords)
            assert one.targets == other.targets
