"""`prepare`: files in, a whole data set out or none; what is dropped is listed."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from datapipe.crystal import Crystal
from datapipe.filters import Filters
from datapipe.manifest import SPLITS, Manifest
from datapipe.prepare import PrepareConfig, plan, prepare, summary
from datapipe.shards import Dataset

ROOT = Path(__file__).resolve().parents[2]
HEADER = ["material_id", "cif", "gap", "formula"]


def structure(i: int) -> Structure:
    """Distinct perovskites with a little disorder in the positions."""
    rng = np.random.default_rng(i)
    frac = np.array([[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    lattice = Lattice.from_parameters(*rng.uniform(4, 5, 3), *rng.uniform(80, 100, 3))
    species = [("Sr", "Ba", "Ca")[i % 3], ("Ti", "Zr")[i % 2], "O", "O", "O"]
    return Structure(lattice, species, frac + rng.uniform(-0.03, 0.03, frac.shape))


@pytest.fixture(scope="module")
def cifs() -> list[str]:
    return [str(CifWriter(structure(i))) for i in range(40)]


def write(path: Path, rows: list[list], header: list[str] = HEADER) -> str:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def rows(cifs: list[str], n: int = 40) -> list[list]:
    return [[f"mp-{i}", cifs[i % len(cifs)], 0.1 * i, "X"] for i in range(n)]


def config(**values) -> PrepareConfig:
    return PrepareConfig(**{"workers": 1, "progress": False, "targets": ["gap"]} | values)


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


@pytest.fixture
def source(tmp_path, cifs) -> str:
    return write(tmp_path / "all.csv", rows(cifs))


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


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t[2].__setitem__(1, "nonsense"), r"all\.csv row 3 \(id 'mp-2'\): .*neither"),
        (lambda t, c: t[2].__setitem__(2, "inf"), r"row 3 \(id 'mp-2'\): label 'gap' is 'inf'"),
        (lambda t, c: t[2].__setitem__(0, "mp-1"), r"1 ids occur more than once: mp-1"),
        (
            lambda t, c: t[2].__setitem__(1, c[2].replace("length_a   4", "length_a   0")),
            r"row 3 \(id 'mp-2'\): .*Å apart",
        ),
    ],
    ids=["unreadable", "label", "duplicate", "close"],
)  # fmt: skip
def test_on_bad_error_stops_and_leaves_nothing(tmp_path, cifs, change, words):
    table = rows(cifs, 10)
    change(table, cifs)
    source = write(tmp_path / "all.csv", table)
    with pytest.raises(ValueError, match=words):
        prepare(config(input=source, output=str(tmp_path / "out"), on_bad="error"))
    assert leftovers(tmp_path) == ["all.csv"]
    assert prepare(config(input=source, output=str(tmp_path / "out"))).provenance["kept"] == 9


def test_chosen_filters_are_no_errors(tmp_path, source):
    filters = Filters(deny=["Ba"])
    out = str(tmp_path / "out")
    manifest = prepare(config(input=source, output=out, filters=filters, on_bad="error"))
    assert manifest.provenance["dropped"] == {"element not wanted": 13}


def test_all_dropped_is_an_error(tmp_path, source):
    filters = Filters(allow=["Na"])
    with pytest.raises(ValueError, match=r"all 40 crystals were dropped \(40 element not wanted\)"):
        prepare(config(input=source, output=str(tmp_path / "out"), filters=filters))
    assert leftovers(tmp_path) == ["all.csv"]


def test_unknown_target_names_the_nearest(tmp_path, source):
    with pytest.raises(ValueError, match=r"no target 'gpa': did you mean 'gap'\? valid: gap$"):
        prepare(config(input=source, output=str(tmp_path / "out"), targets=["gpa"]))
    filters = Filters(labels={"ehull": [0, 1]})
    with pytest.raises(ValueError, match="no target 'ehull'"):
        prepare(config(input=source, output=str(tmp_path / "out"), filters=filters))
    assert leftovers(tmp_path) == ["all.csv"]


def test_used_output_is_refused_and_untouched(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="out already holds files"):
        prepare(config(input=source, output=str(out)))
    assert leftovers(out) == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    prepare(config(input=source, output=str(out)))
    before = contents(out)
    with pytest.raises(ValueError, match="out already holds a data set"):
        prepare(config(input=source, output=str(out)))
    assert contents(out) == before and leftovers(tmp_path) == ["all.csv", "out"]


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


def test_unlabelled_set_for_pretraining(tmp_path, source):
    manifest = prepare(config(input=source, output=str(tmp_path / "out"), targets=[]))
    assert manifest.targets == {} and sum(manifest.splits.values()) == 40


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
    import hashlib

    manifest = prepare(config(input=source, output=str(tmp_path / "out")))
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert manifest.provenance["sources"] == [
        {"name": "all.csv", "format": "csv", "sha256": digest}
    ]
    assert manifest.provenance["split"] == {"rule": "ratio", "seed": 123}
    assert Manifest.load(tmp_path / "out") == manifest
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"on_bad": "ignore"}, "on_bad must be drop or error, got 'ignore'"),
        ({"split": "published"}, r"unknown split 'published': did you mean 'published-123'\?"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"units": {"gpa": "eV"}}, r"units\.gpa: no such target: did you mean 'gap'\?"),
    ],
)
def test_bad_settings(values, words):
    with pytest.raises(ValueError, match=words):
        config(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "give either input=… or train=…"),
        ({"input": "a.csv", "train": "b.csv"}, "give either input=… or train=…"),
        ({"input": "a.csv"}, "'a.csv' does not exist"),
        ({"input": "a.csv", "output": ""}, "setting 'output' is required"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, values, words):
    with pytest.raises(ValueError, match=words):
        prepare(config(**{"output": str(tmp_path / "out")} | values))
    assert leftovers(tmp_path) == []


def test_input_that_changes_on_the_way(tmp_path, cifs, monkeypatch):
    source = write(tmp_path / "all.csv", rows(cifs, 10))
    from datapipe import prepare as module

    assign = module._assign

    def meddle(work, scan):
        write(tmp_path / "all.csv", rows(cifs, 9))
        return assign(work, scan)

    monkeypatch.setattr(module, "_assign", meddle)
    with pytest.raises(ValueError, match="the input changed while it was read: 'mp-9' is gone"):
        prepare(config(input=source, output=str(tmp_path / "out")))
    assert leftovers(tmp_path) == ["all.csv"]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs" / "prepare").glob("*.yaml")), ids=lambda f: f.stem
)
def test_shipped_configs_are_valid(file):
    from trainer.config import from_sources

    assert from_sources(PrepareConfig, [str(file)]) != PrepareConfig()


def test_plan_writes_nothing(tmp_path, source):
    text = plan(config(input=source, output=str(tmp_path / "out"), n_val=5, n_test=5))
    assert "split count: 30 train, 5 val, 5 test, 0 in none" in text
    assert leftovers(tmp_path) == ["all.csv"]


# The command


def launch(*args: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "prepare.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def test_command_ends_with_a_summary_or_one_line(tmp_path, source):
    out = tmp_path / "out"
    good = launch(f"input={source}", f"output={out}", "targets=[gap]", "filters.atoms=[2,40]")
    bad = launch(f"input={source}", f"output={tmp_path / 'b'}", "targets=[gpa]", "progress=false")
    text, _ = good.communicate()
    assert good.returncode == 0
    assert "40 crystals: 32 train, 4 val, 4 test" in text and str(out) in text
    text, error = bad.communicate()
    assert bad.returncode == 2 and text == ""
    assert error.splitlines() == [f"error: {source} has no target 'gpa': did you mean 'gap'? "
                                  "valid: gap"]  # fmt: skip


def test_killed_at_any_moment_then_run_again(tmp_path, cifs):
    source = write(tmp_path / "all.csv", rows(cifs, 3000))
    wanted = prepare(config(input=source, output=str(tmp_path / "wanted"), shard_size=100))
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    args = (f"input={source}", f"output={out}", "targets=[gap]", "shard_size=100", "workers=2")
    for size in (0, 8):  # in the first shard, after some
        process = launch(*args, start_new_session=True)
        while process.poll() is None and len(list(partial.glob("*.tar"))) <= size:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
        assert not out.exists()
    process = launch(*args)
    assert process.communicate() and process.returncode == 0
    assert Manifest.load(out).fingerprint == wanted.fingerprint
    assert not partial.exists()
    shutil.rmtree(out)
