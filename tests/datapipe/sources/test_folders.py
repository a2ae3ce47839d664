"""Folders and archives as people keep them: nested, zipped, linked, with clutter, with splits."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import stat
import tarfile
import zipfile

import numpy as np
import pytest

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.preparing.write import plan
from crysforge.datapipe.sources import Failure, Options, read_crystals
from tests.salts import CASES, GAP_OF, GAPS, TEXTS, N, labelled, put, read, table
from tests.tables import config

ROWS = [(f"salt{i}.cif", gap) for i, gap in enumerate(GAPS)]


def pack(folder, kind):
    """An archive of a folder, or the folder itself."""
    if kind == "folder":
        return folder
    return folder.parent / shutil.make_archive(str(folder), kind, folder.parent, folder.name)


KINDS = ["folder", "zip", "tar", "gztar"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["salt{}.cif", "salt{}/POSCAR", "a/b/salt{}.cif", "salt{}/x/y.cif"]
)
def test_nested_and_packed(tmp_path, kind, name):
    folder = tmp_path / "set"
    if name.endswith("POSCAR"):
        for i, text in enumerate(TEXTS):
            (folder / f"salt{i}").mkdir(parents=True)
            (folder / f"salt{i}" / "POSCAR").write_text(text)  # told by what it holds
    else:
        put(folder, name)
    (folder / "labels.csv").write_text(table([(f"salt{i}", g) for i, g in enumerate(GAPS)]))
    assert labelled(pack(folder, kind)) == GAP_OF


@pytest.mark.parametrize("kind", KINDS)
def test_clutter_is_ignored_and_other_files_are_named(tmp_path, kind):
    folder = put(tmp_path / "set", "cifs/salt{}.cif")
    hidden = ["._salt0.cif", ".DS_Store", "__MACOSX/cifs/._salt0.cif", ".git/a.cif", "Thumbs.db",
              "cifs/.ipynb_checkpoints/salt0.cif", "~$labels.csv", "desktop.ini"]  # fmt: skip
    for name in hidden:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\x05\x16\x07")
    (folder / "labels.csv").write_text(table(ROWS))
    (folder / "notes.md").write_text("x")
    (folder / "cifs" / "salt0.out").write_text("x")
    notes: list[str] = []
    path = pack(folder, kind)
    assert labelled(path, notes=notes) == GAP_OF
    inside = "" if kind == "folder" else "set/"
    note = notes[-1]
    assert note.startswith("not read: 2 other files (")
    assert f"{inside}notes.md" in note and f"{inside}cifs/salt0.out" in note


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_files_within(tmp_path, packing, kind):
    import bz2
    import lzma

    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[packing]
    folder = tmp_path / "set"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"salt{i}.cif.{packing}").write_bytes(compress(text.encode()))
    for called in ("salt{}", "salt{}.cif", "salt{}.cif." + packing):
        (folder / "t.csv").write_text(table([(called.format(i), g) for i, g in enumerate(GAPS)]))
        assert labelled(pack(folder, kind)) == GAP_OF


def test_links_within_are_followed_and_each_file_is_read_once(tmp_path):
    folder = put(tmp_path / "set", "all/salt{}.cif", 4)
    blobs = folder / ".blobs"
    blobs.mkdir()
    for i in range(4, N):
        (blobs / f"{i:x}").write_text(TEXTS[i])
        (folder / f"salt{i}.cif").symlink_to(f".blobs/{i:x}")
    (folder / "train").mkdir()
    (folder / "train" / "first.cif").symlink_to("../all/salt0.cif")
    (folder / "again").symlink_to("all")
    (folder / "loop").symlink_to(".")
    (folder / "self.cif").symlink_to("self.cif")
    (folder / "gone.cif").symlink_to("nowhere.cif")
    rows = [("train/first.cif", GAPS[0]), ("again/salt1", GAPS[1]), *ROWS[2:]]
    (folder / "t.csv").write_text(table(rows))
    notes: list[str] = []
    assert labelled(folder, notes=notes) == GAP_OF
    assert any("to what is read anyway" in note for note in notes)
    assert any("not followed: 2 links (" in note and "gone.cif" in note for note in notes)


def test_links_out_of_a_folder_need_leave(tmp_path):
    store = put(tmp_path / "store")
    folder = put(tmp_path / "set", count=2)
    (folder / "more").symlink_to(store)
    (folder / "one.cif").symlink_to(store / "salt5.cif")
    notes: list[str] = []
    assert len(read(folder, [], notes=notes)) == 2
    assert notes == ["not followed: 2 links (more, one.cif) out of set or to nothing; read them "
                     "with follow_links=true"]  # fmt: skip
    found = read(folder, [], follow_links=True)
    assert {c.id for c in found} == {*(f"more/salt{i}" for i in range(N)), "salt0", "salt1", "one"}
    for path in folder.glob("salt*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no structure files .* follow_links=true"):
        read(folder, [])


def test_a_folder_of_links_is_hashed_by_what_is_read(tmp_path):
    store = put(tmp_path / "store")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "more").symlink_to(store)
    settings = {"input": str(tmp_path / "set"), "targets": [], "follow_links": True}
    hashes = set()
    for name in ("a", "b"):
        manifest = prepare(config(output=str(tmp_path / name), **settings))
        hashes.add(manifest.provenance["sources"][0]["sha256"])
        shutil.copy(store / "salt0.cif", store / "salt1.cif")
    assert len(hashes) == 2


def test_links_within_archives(tmp_path):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(N):
            entry = tarfile.TarInfo(f"blobs/{i}")
            entry.size = len(TEXTS[i].encode())
            tar.addfile(entry, io.BytesIO(TEXTS[i].encode()))
            link = tarfile.TarInfo(f"cifs/salt{i}.cif")
            hard = i % 2
            link.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
            link.linkname = f"blobs/{i}" if hard else f"../blobs/{i}"
            tar.addfile(link)
        out = tarfile.TarInfo("cifs/out.cif")
        out.type, out.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(out)
    notes: list[str] = []
    found = read(path, [], notes=notes)
    assert {c.id for c in found} == set(GAP_OF)
    assert notes[-1].startswith("not followed: 1 link (cifs/out.cif)")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(N):
            archive.writestr(f"blobs/{i}", TEXTS[i])
            link = zipfile.ZipInfo(f"cifs/salt{i}.cif")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, f"../blobs/{i}")
        out = zipfile.ZipInfo("cifs/out.cif")
        out.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(out, "/etc/passwd")
    assert {c.id: c.numbers.tolist() for c in read(tmp_path / "set.zip", [])} == {
        c.id: c.numbers.tolist() for c in found
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any folder")
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path):
    folder = put(tmp_path / "set", "a/salt{}.cif")
    (folder / "a").chmod(0)
    try:
        with pytest.raises(ValueError, match="Permission denied"):
            read(folder, [])
    finally:
        (folder / "a").chmod(0o700)


# Splits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names",
    [
        ("id_prop_train.csv", "id_prop_val.csv", "id_prop_test.csv"),
        ("train.csv", "valid.csv", "test.csv"),
        ("train_set.txt", "validation_set.txt", "testing_set.txt"),
        ("id_prop.train.csv", "id_prop.dev.csv", "id_prop.test.csv"),
    ],
)
def test_a_table_for_each_split(tmp_path, kind, names):
    folder = put(tmp_path / "set")
    for name, part in zip(names, (ROWS[:6], ROWS[6:8], ROWS[8:11]), strict=True):
        (folder / name).write_text(table(part, ("file", "gap"), "\t"))
    (folder / "id_prop.csv").write_text(table(ROWS))
    manifest = prepare(config(input=str(pack(folder, kind)), output=str(tmp_path / "out")))
    assert manifest.splits == {"train": 6, "val": 2, "test": 3}
    assert manifest.provenance["dropped"] == {"not listed": 1}
    assert manifest.provenance["split"] == {"rule": "keep"}


@pytest.mark.parametrize("labels", ["id_prop.csv", "gaps.tsv"])
def test_lists_of_files_for_each_split_beside_a_table_of_labels(tmp_path, labels):
    folder = put(tmp_path / "set")
    parts = {"train.txt": ROWS[:8], "val.txt": ROWS[8:10], "test.txt": ROWS[10:]}
    for name, part in parts.items():
        (folder / name).write_text("".join(f"{id}\n" for id, _ in part))
    (folder / labels).write_text(table(ROWS, ("sample", "gap"), "\t"))
    manifest = prepare(config(input=str(folder), output=str(tmp_path / "out")))
    assert manifest.splits == {"train": 8, "val": 2, "test": 2}
    assert manifest.targets["gap"].labelled == manifest.splits
    assert labelled(folder) == GAP_OF


def test_one_table_called_test_is_no_split(tmp_path):
    folder = put(tmp_path / "set")
    (folder / "test.csv").write_text(table(ROWS))
    manifest = prepare(config(input=str(folder), output=str(tmp_path / "out")))
    assert manifest.splits == {"train": 10, "val": 1, "test": 1}


def test_tables_of_splits_of_something_else_are_none(tmp_path):
    folder = put(tmp_path / "set")
    for name in ("train.csv", "test.csv"):
        (folder / name).write_text("word,count\nsalt,1\nsugar,2\n")
    (folder / "gaps.csv").write_text(table(ROWS))
    manifest = prepare(config(input=str(folder), output=str(tmp_path / "out")))
    assert manifest.splits == {"train": 10, "val": 1, "test": 1}
    assert "not read: 2 other files (test.csv, train.csv)" in manifest.provenance["notes"]


def test_lists_of_splits_of_which_one_has_labels(tmp_path):
    folder = put(tmp_path / "set")
    (folder / "train.csv").write_text(table(ROWS[:8], ("file", "gap")))
    (folder / "test.csv").write_text(table([row[:1] for row in ROWS[8:]], ("file",)))
    for labels in (None, "id_prop.csv"):
        if labels:
            (folder / labels).write_text(table(ROWS))
        out = tmp_path / str(labels)
        manifest = prepare(config(input=str(folder), output=str(out)))
        assert manifest.splits == {"train": 8, "val": 0, "test": 4}
        assert manifest.targets["gap"].labelled["test"] == (4 if labels else 0)


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_folder_of_one_file_for_each_split(tmp_path, suffix, kind):
    folder = tmp_path / "mp_20"
    folder.mkdir()
    for split, part in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, 12))):
        records = [{"material_id": f"salt{i}", "cif": TEXTS[i], "gap": GAPS[i]} for i in part]
        rows = [tuple(r.values()) for r in records]
        text = table(rows, tuple(records[0])) if suffix == "csv" else json.dumps(records)
        (folder / f"{split}.{suffix}").write_text(text)
    (folder / "README.md").write_text("x")
    path = str(pack(folder, kind))
    manifest = prepare(config(input=path, output=str(tmp_path / "out")))
    assert manifest.splits == {"train": 8, "val": 2, "test": 2}
    assert "not read: 1 other file (" in manifest.provenance["notes"][0]
    assert "8 train, 2 val, 2 test" in plan(config(input=path, output=str(tmp_path / "b")))


def test_a_folder_of_structures_in_json(tmp_path):
    records = [json.loads(line) for line in (CASES / "lines.json").read_text().splitlines()]
    for i, record in enumerate(records):
        (tmp_path / f"salt{i}.json").write_text(json.dumps(record["structure"]))
    (tmp_path / "atom_init.json").write_text('{"1": [0, 1]}')
    assert {c.id for c in read(tmp_path, [])} == set(GAP_OF)


def test_several_files_of_crystals_are_not_mixed(tmp_path):
    for name in ("old.csv", "new.csv"):
        (tmp_path / name).write_text(table([("a", TEXTS[0])], ("id", "cif")))
    with pytest.raises(ValueError, match=r"several files of crystals \(new.csv, old.csv\)"):
        read(tmp_path, [])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["a.txt"], r"holds no structure files .* it has 1 other file \(a.txt\)"),
        (["b.xlsx"], r"b.xlsx is a workbook: save its table as CSV"),
        (["c/d.bin"], r"it has 1 other file \(c/d.bin\)"),
        ([".hidden.cif"], r"holds no structure files"),
    ],
)
def test_folders_without_crystals(tmp_path, files, words):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hello")
    with pytest.raises(ValueError, match=words):
        read(tmp_path, [])


def test_archives_of_other_files_say_what_to_do(tmp_path):
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        (tmp_path / "set" / f"{split}.csv").write_text(table([("a", TEXTS[0])], ("id", "cif")))
    with pytest.raises(ValueError, match=r"it has 2 other files \(set/test.csv, .*\): unpack it"):
        read(pack(tmp_path / "set", "tar"), [])
    (tmp_path / "a.7z").touch()
    with pytest.raises(ValueError, match=r"a.7z is packed in a way that is not read: unpack it"):
        read(tmp_path / "a.7z", [])


def test_files_under_a_wrong_name_say_what_to_do(tmp_path):
    (tmp_path / "a.csv").write_text(json.dumps(RECORDS))
    (tmp_path / "b.json").write_text(table([tuple(r.values()) for r in RECORDS], RECORDS[0]))
    for name, kind in (("a.csv", "json"), ("b.json", "csv")):
        with pytest.raises(ValueError, match=f"{name}.* give format={kind}"):
            read(tmp_path / name)
        options = Options(targets=("gap",), wanted=("gap",))
        found = read_crystals(str(tmp_path / name), kind, targets=["gap"], options=options)
        assert {c.id: c.targets["gap"] for c in found} == GAP_OF


def test_pandas_tables_with_two_columns_of_one_name(tmp_path):
    split = {"columns": ["id", "cif", "gap", "gap"], "data": [["a", TEXTS[0], 1, 2]]}
    (tmp_path / "a.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match=r"a.json: two columns are named gap: rename"):
        read(tmp_path / "a.json")


def test_workbooks_say_what_to_do(tmp_path):
    for name in ("a.xlsx", "a.csv"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("xl/workbook.xml", "<x/>")
        with pytest.raises(ValueError, match=r"is a workbook.*: save its table as CSV"):
            read(tmp_path / name, [])


# Lines, arrays and tables of JSON

RECORDS = [{"id": f"salt{i}", "cif": TEXTS[i], "gap": GAPS[i]} for i in range(N)]


def columns(kind):
    return {k: kind([r[k] for r in RECORDS]) for k in RECORDS[0]}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.json.gz"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS),
        "\n".join(map(json.dumps, RECORDS)),
        "\r\n".join(map(json.dumps, RECORDS)) + "\r\n\r\n",
        "\n".join(json.dumps(r, indent=2) for r in RECORDS),
        json.dumps({r["id"]: r for r in RECORDS}),
        json.dumps(columns(list)),
        json.dumps(columns(lambda v: {str(i): x for i, x in enumerate(v)})),
        json.dumps({"schema": {"fields": [{"name": "cif"}]}, "data": RECORDS}),
        json.dumps({"columns": list(RECORDS[0]), "index": list(range(N)),
                    "data": [list(r.values()) for r in RECORDS]}),
        json.dumps(RECORDS[:7]) + "\n" + json.dumps(RECORDS[7:]),
        json.dumps({"version": 1}) + "\n" + "\n".join(map(json.dumps, RECORDS)),
    ],
    ids=["array", "lines", "crlf", "indented", "mapping", "lists", "columns", "table", "split",
         "arrays", "remark"],
)  # fmt: skip
def test_json_is_told_by_what_it_holds(tmp_path, name, text):
    data = text.encode("utf-16" if name == "a.jsonl" else "utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert labelled(tmp_path / name) == GAP_OF


def test_a_single_record_is_no_mapping(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[3] | {"id": None}))
    (tmp_path / "two.json").write_text(json.dumps({k: RECORDS[3][k] for k in ("cif", "gap")}))
    assert isinstance(read(tmp_path / "one.json")[0], Failure)
    assert labelled(tmp_path / "two.json") == {"two": GAPS[3]}


# What users type


@pytest.mark.parametrize("way", ["inside", "beside", "path column", "text column"])
def test_the_four_natural_ways(tmp_path, call, way):
    cifs = put(tmp_path / "cifs")
    place = {"inside": cifs / "measured values.csv"}.get(way, tmp_path / "measured values.csv")
    cells = {"path column": lambda i: f"cifs/salt{i}.cif", "text column": lambda i: TEXTS[i]}
    cell = cells.get(way, lambda i: f"salt{i}")
    place.write_text(table([(cell(i), gap) for i, gap in enumerate(GAPS)], ("cif", "gap"), ";"))
    given = [f"input={cifs if way in ('inside', 'beside') else place}"]
    common = [f"output={tmp_path / 'out'}", "targets=[gap]", "progress=false", "workers=1"]
    if way == "beside":
        code, _, err = call("prepare", *given, *common)
        assert code == 2 and f"measured values.csv has it: give labels={place}" in err
        assert len(err.splitlines()) == 1
        given.append(f"labels={place}")
    code, out, err = call("prepare", *given, *common)
    assert code == 0, err
    assert "target gap: 12 labelled, 0 unlabelled" in out and "dropped 0" in out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jarvis", r"did you mean the data set 'jarvis-dft3d'\? Get it from .*figshare"),
        ("mp20", r"did you mean the data set 'mp-20'"),
        ("perov", "did you mean the data set 'perov-5'"),
        ("matbench_mp_gap", "did you mean the data set 'matbench'"),
        ("crystal.csv", r"did you mean '.*crystals\.csv'"),
        ("nowhere/x.csv", "there is no folder 'nowhere'"),
        ("zzz", r"'zzz' does not exist$"),
    ],
)
def test_inputs_that_are_not_there(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "crystals.csv").touch()
    with pytest.raises(ValueError, match=words):
        read(name)


def test_labels_change_what_identifies_a_set(tmp_path):
    folder = put(tmp_path / "cifs")
    (tmp_path / "l.csv").write_text(table(ROWS))
    out = str(tmp_path / "out")
    manifest = prepare(config(input=str(folder), labels=str(tmp_path / "l.csv"), output=out))
    names = [(s["name"], s["format"]) for s in manifest.provenance["sources"]]
    assert names == [("cifs", "folder"), ("l.csv", "labels")]
    assert np.isfinite([c.targets["gap"] for c in read(out) if isinstance(c, Crystal)]).all()
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_workbook_of_labels_beside_a_folder_says_what_to_do(tmp_path):
    folder = put(tmp_path / "set")
    (folder / "labels.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(
        ValueError, match=r"if labels.xlsx has it, save its table as CSV .* labels="
    ):
        prepare(config(input=str(folder), output=str(tmp_path / "out"), targets=["gap"]))


def test_folders_of_splits_are_told_of(tmp_path):
    for split in ("train", "val", "test"):
        put(tmp_path / "set" / split, split + "{}.cif", count=3)
    manifest = prepare(
        config(input=str(tmp_path / "set"), output=str(tmp_path / "out"), targets=[])
    )
    (note,) = manifest.provenance["notes"]
    assert "read as one set" in note and f"test={tmp_path / 'set' / 'test'}" in note
    given = dict(part.split("=") for part in note.split(" give ")[1].split())
    one = prepare(config(input="", output=str(tmp_path / "split"), targets=[], **given))
    assert set(one.splits.values()) == {3}
