"""Crystals and data sets from a stranger run no code, are read nowhere but where they lie, and take
no more memory than a multiple of their bytes."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy as safetensors

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.sources import Failure, read_crystals, texts
from crysforge.datapipe.storage import writer as writing
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.datapipe.storage.plain_tar import PlainEntries
from tests.exploits import PICKLES

SMALL = 1 << 20
"""Bytes that stand for the largest file in these tests."""
CIF = """data_x
_cell_length_a 3
_cell_length_b 3
_cell_length_c 3
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
{}
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Na Na 0 0 0
Cl Cl 0.5 0.5 0.5
"""


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(texts, "MAX_FILE", SMALL)


def read(path: Path) -> list[Crystal | Failure]:
    return list(read_crystals(str(path), workers=1))


def refused(words: str, path: Path) -> None:
    """As a whole, or each crystal of it, with one line."""
    try:
        results = read(path)
    except ValueError as error:
        messages = [str(error)]
    else:
        assert results and all(isinstance(r, Failure) for r in results)
        messages = [str(r) for r in results]
    for message in messages:
        assert words in message and "\n" not in message


SUFFIXES = "json jsonl csv cif vasp extxyz db zip tar json.gz csv.bz2 json.xz tar.gz pkl npy pt"


@pytest.mark.parametrize("suffix", SUFFIXES.split())
@pytest.mark.parametrize("dump", PICKLES)
def test_pickles_in_place_of_crystals(dump, suffix, exploit, tmp_path):
    path = tmp_path / f"crystals.{suffix}"
    dump(exploit, path)
    for ending, pack in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        if suffix.endswith(ending):
            path.write_bytes(pack.compress(path.read_bytes()))
    refused("", path)


def test_pickles_in_folders_archives_and_databases(exploit, tmp_path):
    from ase import Atoms
    from ase.db import connect

    data = pickle.dumps(exploit)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.cif").write_bytes(data)
    refused("cannot read the structure", folder)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.cif", data)
    refused("cannot read the structure", tmp_path / "a.zip")
    database = tmp_path / "a.db"
    with connect(database) as db:
        db.write(Atoms("H", cell=[3, 3, 3], pbc=True), data={"x": np.arange(3)})
    for column in ("data", "key_value_pairs", "numbers"):
        with connect(database).managed_connection() as connection:
            connection.execute(f"update systems set {column} = ?", (data,))
        refused("", database) if column != "data" else read(database)


def test_text_that_some_parsers_evaluate(exploit, tmp_path):
    """A CIF's transformation (CVE-2024-23346) and lists written as Python."""
    root = "().__class__.__mro__[1]"
    classes = f"{root}.__getattribute__(*[{root}, '__sub' + 'classes__'])()"
    importer = f"[c for c in {classes} if c.__name__ == 'BuiltinImporter'][0]"
    lines = (
        f"_space_group_magn.transform_BNS_Pp_abc "
        f"\"a,b,{importer}.load_module ('os').mkdir ('{exploit.path}');0,0,0\"",
        "_space_group_magn.number_BNS 62.448",
        "_space_group_magn.name_BNS \"P n' m a'\"",
    )
    (tmp_path / "a.cif").write_text(CIF.format("\n".join(lines)))
    read(tmp_path / "a.cif")
    with open(tmp_path / "oqmd.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "unit_cell", "sites"])
        for i, text in enumerate((f"__import__('os').mkdir('{exploit.path}')", "(" * 9000)):
            table.writerow([i, text, "[]"])
        for i, text in enumerate(("-" * 90_000 + "1", "[" * 90_000, "9" * 90_000), start=2):
            table.writerow([i, text, "[]"])
    refused("cannot read the structure", tmp_path / "oqmd.csv")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" + "9" * 100_000 + "]"])
def test_json_that_nests_or_counts_without_end(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    refused("a.json", tmp_path / "a.json")


@pytest.mark.parametrize("pack", [gzip, bz2, lzma], ids=["gz", "bz2", "xz"])
@pytest.mark.parametrize("start", [b"[", b"id,cif\na,", b"id,cif\n" + b"a,b\n" * 9])
def test_bombs_in_compressed_files(pack, start, tmp_path):
    suffix = {gzip: "gz", bz2: "bz2", lzma: "xz"}[pack]
    kind = "json" if start == b"[" else "csv"
    path = tmp_path / f"bomb.{kind}.{suffix}"
    path.write_bytes(pack.compress(start + b'"' + b"0" * (SMALL * 12)))
    assert path.stat().st_size < SMALL / 20
    refused("unpacks to more than 200 times its size", path)


def test_bombs_in_archives(tmp_path):
    zeros = bytes(SMALL + 1)
    for name in ("a.cif", "id_prop.csv"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, zeros)
            archive.writestr("b.cif" if name == "id_prop.csv" else "about.txt", "another file")
        refused("more than any structure", tmp_path / "a.zip")
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
            entry = tarfile.TarInfo(name)
            entry.size = len(zeros)
            tar.addfile(entry, io.BytesIO(zeros))
            if name == "id_prop.csv":
                tar.addfile(tarfile.TarInfo("b.cif"))
        refused("more than any structure", tmp_path / "a.tar.gz")
    with zipfile.ZipFile(tmp_path / "one.json.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one.json", b'["' + b"0" * (SMALL * 12))
    refused("unpacks to more than 200 times its size", tmp_path / "one.json.zip")
    (tmp_path / "sparse.tar").write_bytes(sparse("a.cif"))
    refused("more than any structure", tmp_path / "sparse.tar")


def sparse(name: str, claimed: int = 10**12) -> bytes:
    """A tar of a few blocks whose one entry claims a terabyte of zeros."""
    entry, out = tarfile.TarInfo(name), io.BytesIO()
    content = b"1\n0\n512\n".ljust(512, b"\0") + bytes(512)
    entry.size = len(content)
    keys = {"major": 1, "minor": 0, "name": name, "realsize": claimed}
    entry.pax_headers = {f"GNU.sparse.{key}": str(value) for key, value in keys.items()}
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def test_members_and_tables_that_point_elsewhere(tmp_path):
    """Names with `..` are names; links, pipes and devices are passed over; nothing is written."""
    secret = tmp_path / "secret.cif"
    secret.write_text(CIF.format(""))
    place = tmp_path / "place"
    place.mkdir()
    with tarfile.open(place / "a.tar", "w") as tar:
        for name in ("../up.cif", "/abs.cif", "a/../../b.cif"):
            entry = tarfile.TarInfo(name)
            entry.size = len(CIF)
            tar.addfile(entry, io.BytesIO(CIF.format("").ljust(len(CIF)).encode()))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            entry = tarfile.TarInfo(f"link{kind.decode()}.cif")
            entry.type, entry.linkname = kind, str(secret)
            tar.addfile(entry)
    assert {c.id for c in read(place / "a.tar")} == {"up", "abs", "b"}
    with zipfile.ZipFile(place / "b.zip", "w") as archive:
        archive.writestr("../c.cif", CIF.format(""))
    assert [c.id for c in read(place / "b.zip")] == ["c"]
    table = tmp_path / "listed"
    table.mkdir()
    (table / "id_prop.csv").write_text(f"../secret.cif,1\n{secret},1\n")
    refused("names files outside of its folder", table)
    (table / "id_prop.csv").unlink()
    os.mkfifo(table / "pipe.cif")
    refused("it has 1 pipe or device (pipe.cif)", table)
    supercon = tmp_path / "supercon"
    supercon.mkdir()
    for name in ("../secret.cif", str(secret)):
        (supercon / "t.csv").write_text(f"file,tc,family,cf,order\n{name},1,a,1,yes\n")
        refused("names a file elsewhere", supercon)
    assert {p.name for p in tmp_path.iterdir()} == {"secret.cif", "place", "listed", "supercon"}


# Data sets. An attacker makes manifest, index and hashes agree with what he puts in.


def write(root: Path, monkeypatch=None, data: bytes | None = None) -> Path:
    """A data set of three crystals, or of three records with this content."""
    if monkeypatch is not None:
        monkeypatch.setattr(writing, "encode", lambda *args, **more: data)
    with DatasetWriter(root, ["gap"]) as writer:
        for i in range(3):
            sites = [[0, 0, 0], [0.5, 0.5, 0.5]]
            writer.add("train", Crystal.create(f"c{i}", [11, 17], sites, 4 * np.eye(3), {"gap": i}))
        writer.finish({})
    return root


def agree(root: Path) -> Path:
    """Makes the manifest's hashes those of the files."""
    manifest = json.loads((root / "manifest.json").read_text())
    for shard in manifest["shards"]:
        content = (root / shard["name"]).read_bytes()
        shard |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    index = (root / "index.safetensors").read_bytes()
    manifest["index_sha256"] = hashlib.sha256(index).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def assert_all_bad(root: Path) -> None:
    dataset = Dataset.open(root)
    assert all(isinstance(c, BadCrystal) for _, c in dataset.read(range(3)))


@pytest.mark.parametrize("dump", PICKLES)
def test_pickles_in_a_data_set(dump, exploit, tmp_path, monkeypatch):
    dump(exploit, tmp_path / "pickle")
    data = (tmp_path / "pickle").read_bytes()
    assert_all_bad(write(tmp_path / "records", monkeypatch, data))
    monkeypatch.undo()
    root = write(tmp_path / "others")
    for name in ("train-000000.tar", "index.safetensors", "manifest.json"):
        damaged = Path(shutil.copytree(root, tmp_path / f"no-{name}"))
        (damaged / name).write_bytes(data)
        if name == "train-000000.tar":
            assert_all_bad(agree(damaged))
            continue
        with pytest.raises(ValueError, match=f"{name} is "):
            Dataset.open(agree(damaged) if name[0] == "i" else damaged)


@pytest.mark.parametrize(
    "suffix", ["pyd", "npy", "npz", "pth", "pt", "pkl", "pickle", "cls", "json"]
)
def test_entries_of_other_kinds_are_not_decoded(suffix, exploit, tmp_path, monkeypatch):
    root = write(tmp_path / "set", monkeypatch, pickle.dumps(exploit))
    tar = root / "train-000000.tar"
    rename(tar, lambda entry: setattr(entry, "name", f"{entry.name[:9]}.{suffix}"))
    assert_all_bad(agree(root))


def rename(tar: Path, edit) -> None:
    """Changes the headers of a tar where they lie."""
    with tarfile.open(tar) as opened:
        places = [entry.offset for entry in opened]
    content = bytearray(tar.read_bytes())
    for place in places:
        entry = tarfile.TarInfo.frombuf(content[place : place + 512], "utf-8", "strict")
        edit(entry)
        content[place : place + 512] = entry.tobuf(tarfile.USTAR_FORMAT)
    tar.write_bytes(content)


@pytest.mark.parametrize("prefix", ["../", "/", "a/../../"])
def test_entries_with_paths_are_written_nowhere(prefix, tmp_path):
    root = write(tmp_path / "in" / "set")
    rename(root / "train-000000.tar", lambda entry: setattr(entry, "name", f"{prefix}{entry.name}"))
    assert_all_bad(agree(root))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_entries_that_are_no_files_end_there(kind, tmp_path):
    root = write(tmp_path / "set")

    def edit(entry: tarfile.TarInfo) -> None:
        if entry.name.startswith("000000001"):
            entry.type, entry.linkname = kind, "/etc/passwd"

    rename(root / "train-000000.tar", edit)
    kinds = [type(c) for _, c in Dataset.open(agree(root)).read(range(3))]
    assert kinds == [Crystal, BadCrystal, Crystal]


def test_entries_that_claim_a_terabyte(tmp_path):
    root = write(tmp_path / "sparse")
    (root / "train-000000.tar").write_bytes(sparse("000000000.safetensors"))
    assert_all_bad(agree(root))
    root = write(tmp_path / "compressed")
    tar = root / "train-000000.tar"
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    assert_all_bad(agree(root))
    root = write(tmp_path / "size")
    rename(root / "train-000000.tar", lambda entry: setattr(entry, "size", 8**11 - 1))
    assert_all_bad(agree(root))


@pytest.mark.parametrize("size", [512, 1024, 10240, 512 * 37])
def test_a_plain_tar_passes_unchanged(size, tmp_path):
    rng = np.random.default_rng(0)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i, length in enumerate([0, 1, 511, 512, 513, 5000, 20_000]):
            entry = tarfile.TarInfo(f"{i:09d}.safetensors")
            entry.size = length
            tar.addfile(entry, io.BytesIO(rng.bytes(length)))
    stream = PlainEntries(io.BytesIO(out.getvalue()))
    assert b"".join(iter(lambda: stream.read(size), b"")) == out.getvalue()


def claim(name: str, shape: list[int], end: int) -> bytes:
    header = json.dumps({name: {"dtype": "F64", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 10**9) + b"{}",
        struct.pack("<Q", 2**64 - 1),
        claim("numbers", [10**9], 8 * 10**9),
        claim("numbers", [2**40, 2**40], 2**62),
        b"",
    ],
    ids=["1 GB header", "2^64", "8 GB tensor", "overflow", "empty"],
)
def test_records_and_indexes_that_claim_too_much(data, tmp_path, monkeypatch):
    assert_all_bad(write(tmp_path / "records", monkeypatch, data))
    monkeypatch.undo()
    root = write(tmp_path / "set")
    (root / "index.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"index\.safetensors"):
        Dataset.open(agree(root))


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("offset", lambda x: x - 10**15),
        ("offset", lambda x: x.astype(np.float64)),
        ("targets", lambda x: x[:1]),
        ("crc32", lambda x: x[:2]),
        ("atoms", lambda x: x.astype(np.float32)),
        ("more", lambda x: np.zeros(3)),
    ],
)
def test_indexes_that_do_not_fit(name, edit, tmp_path):
    root = write(tmp_path / "set")
    index = safetensors.load_file(root / "index.safetensors")
    index[name] = edit(index.get(name))
    safetensors.save_file(index, root / "index.safetensors")
    with pytest.raises(ValueError, match="does not belong to the manifest"):
        Dataset.open(agree(root))


def test_manifests_that_nest_without_end(tmp_path):
    root = write(tmp_path / "set")
    (root / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        Dataset.open(root)
