"""What is on disk: records, data sets that are whole or not there, damage that is found."""

import hashlib
import json
import os
import signal

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.storage.dataset import (
    SPLITS,
    Dataset,
    DatasetWriter,
    Manifest,
    decode,
    encode,
)
from crysforge.datapipe.storage.remote import Access

TARGETS = ["e_form", "gap"]


def equal(a, b):
    labels = [[c.targets.get(t, np.nan) for t in TARGETS] for c in (a, b)]
    return a.id == b.id and all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(
            (a.numbers, a.frac_coords, a.lattice, labels[0]),
            (b.numbers, b.frac_coords, b.lattice, labels[1]),
            strict=True,
        )
    )


@pytest.fixture(scope="module")
def crystals(random_crystal):
    rng = np.random.default_rng(0)
    labels = [{"e_form": -1.5, "gap": 0.25}, {"gap": 2.0}, {}, {"e_form": 0.5, "gap": np.nan}]
    return [
        random_crystal(rng, 1 + i % 7, f"mp-{i}", {k: v + i for k, v in labels[i % 4].items()})
        for i in range(60)
    ]


def split_of(i):
    return "val" if i % 5 == 0 else "test" if i % 7 == 0 else "train"


def write(root, crystals, shard_size=11):
    with DatasetWriter(root, TARGETS, {"e_form": "eV/atom"}, shard_size) as writer:
        for i, crystal in enumerate(crystals):
            writer.add(split_of(i), crystal)
        return writer.finish({"source": "test"})


@pytest.fixture(scope="module")
def root(tmp_path_factory, crystals):
    root = tmp_path_factory.mktemp("shards") / "data"
    write(root, crystals)
    return root


@pytest.fixture
def copy(tmp_path, root):
    """A data set to damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for path in root.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def in_order(crystals):
    return [c for s in SPLITS for i, c in enumerate(crystals) if split_of(i) == s]


def test_record_round_trip(crystals):
    for crystal in crystals:
        assert equal(decode(encode(crystal, TARGETS), TARGETS), crystal)


def test_decode_refuses_what_is_no_crystal(crystals):
    good = crystals[5]
    lattice = good.lattice.copy()
    lattice[0, 0] = np.nan
    frac = good.frac_coords[:-1]
    bad = [
        b"",
        b"\x00" * 100,
        encode(good, TARGETS)[:-1],
        encode(good, ["gap"]),
        encode(Crystal("x", good.numbers, good.frac_coords, lattice), TARGETS),
        encode(Crystal("x", good.numbers, frac, good.lattice), TARGETS),
        encode(Crystal("x", good.numbers, good.frac_coords, -good.lattice), TARGETS),
        encode(Crystal("x", good.numbers * 0, good.frac_coords, good.lattice), TARGETS),
        encode(good.with_targets({"gap": np.inf}), TARGETS),
    ]
    for data in bad:
        with pytest.raises(BadCrystal):
            decode(data, TARGETS)


JSON = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.data())
def test_decode_of_a_header_with_nonsense_is_bad_crystal_or_the_crystal(crystals, data):
    record = encode(crystals[5], TARGETS)
    end = 8 + int.from_bytes(record[:8], "little")
    header = json.loads(record[8:end])
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from([*header[name], None]))
    value = data.draw(
        JSON | st.sampled_from([[-1], [-8, 0], [-(10**6)], [10**30], [2**62, 2], "F16", [[0]] * 99])
    )
    if field is None:
        header[name] = value
    else:
        header[name][field] = value
    text = json.dumps(header).encode()
    try:
        found = decode(len(text).to_bytes(8, "little") + text + record[end:], TARGETS)
    except BadCrystal:
        return
    assert len(found) == len(crystals[5])
    assert isinstance(found.id, str)


def test_decode_of_a_header_that_nests_without_end_is_bad_crystal():
    text = b"[" * 100_000
    with pytest.raises(BadCrystal, match="not a crystal record"):
        decode(len(text).to_bytes(8, "little") + text, TARGETS)


@given(st.binary(max_size=300))
def test_decode_of_garbage_is_always_bad_crystal(data):
    with pytest.raises(BadCrystal):
        decode(data, TARGETS)


def test_dataset_holds_what_was_added(root, crystals):
    dataset = Dataset.open(root)
    expected = in_order(crystals)
    read = list(dataset.read(range(len(dataset))))
    assert [i for i, _ in read] == list(range(60))
    assert all(equal(c, e) for (_, c), e in zip(read, expected, strict=True))
    assert dataset.atoms.tolist() == [len(c) for c in expected]
    assert np.allclose(dataset.volume, [c.volume for c in expected])
    gaps = [c.targets.get("gap", np.nan) for c in expected]
    assert np.array_equal(dataset.targets_of("gap"), gaps, equal_nan=True)
    for split in SPLITS:
        ids = {c.id for i, c in enumerate(crystals) if split_of(i) == split}
        assert {c.id for _, c in dataset.read(dataset.split_items(split))} == ids


def test_manifest_says_what_is_there(root, crystals):
    manifest = Manifest.load(root)
    for shard in manifest.shards:
        data = (root / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        assert shard.count <= 11
    train = [c for i, c in enumerate(crystals) if split_of(i) == "train"]
    known = np.array(
        [c.targets["gap"] for c in train if not np.isnan(c.targets.get("gap", np.nan))]
    )
    gap = manifest.targets["gap"]
    assert (gap.mean, gap.std) == pytest.approx((known.mean(), known.std()))
    assert gap.labelled["train"] == len(known)
    assert [manifest.targets[t].unit for t in TARGETS] == ["eV/atom", None]
    assert manifest.elements == sorted({int(z) for c in crystals for z in c.numbers})
    assert manifest.provenance == {"source": "test"}
    assert {p.name for p in root.iterdir()} == (
        {s.name for s in manifest.shards} | {"manifest.json", "index.safetensors"}
    )


def test_same_crystals_give_the_same_bytes(root, crystals, tmp_path):
    assert write(tmp_path / "again", crystals) == Manifest.load(root)
    other = write(tmp_path / "other", crystals[:-1])
    assert other.fingerprint != Manifest.load(root).fingerprint


def test_a_data_set_may_lie_behind_a_url(root, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in root.iterdir():
        memory.pipe(f"/shards/{path.name}", path.read_bytes())
    access = Access(cache_dir=str(tmp_path))
    local, remote = Dataset.open(root), Dataset.open("memory://shards/", access)
    pairs = zip(local.read(range(60)), remote.read(range(60)), strict=True)
    assert all(equal(a, b) for (_, a), (_, b) in pairs)
    with pytest.raises(ValueError, match="memory://none is not a data set"):
        Dataset.open("memory://none")


def test_without_labels_or_splits(tmp_path, random_crystal):
    crystal = random_crystal(np.random.default_rng(1), 3, "only")
    with DatasetWriter(tmp_path / "d", []) as writer:
        writer.add("val", crystal)
        writer.finish({})
    dataset = Dataset.open(tmp_path / "d")
    assert dataset.targets.shape == (1, 0)
    assert [len(dataset.split_items(s)) for s in SPLITS] == [0, 1, 0]
    assert next(dataset.read([0]))[1].id == "only"
    with pytest.raises(ValueError, match="no target 'gap'"):
        dataset.targets_of("gap")
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        dataset.split_items("valid")


@given(items=st.lists(st.integers(0, 59), max_size=80))
def test_reads_in_any_order(root, crystals, items):
    expected = in_order(crystals)
    for (item, crystal), wanted in zip(Dataset.open(root).read(items), items, strict=True):
        assert item == wanted
        assert equal(crystal, expected[item])


def test_a_flipped_byte_costs_one_crystal_and_never_gives_a_wrong_one(copy, crystals):
    dataset, expected = Dataset.open(copy), in_order(crystals)
    path, rng = copy / dataset.manifest.shards[1].name, np.random.default_rng(2)
    sound = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(sound)
        damaged[rng.integers(len(sound))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        read = [c for _, c in dataset.read(range(60))]
        bad = [i for i, c in enumerate(read) if isinstance(c, BadCrystal)]
        assert len(bad) <= 1
        assert all(
            equal(c, e) for i, (c, e) in enumerate(zip(read, expected, strict=True)) if i not in bad
        )
        assert all(path.name in str(read[i]) for i in bad)


def test_truncated_shards_lose_only_their_tail(copy, crystals):
    dataset, expected = Dataset.open(copy), in_order(crystals)
    shard = dataset.manifest.shards[0]
    path = copy / shard.name
    sound = path.read_bytes()
    for length in range(0, len(sound), 700):
        path.write_bytes(sound[:length])
        read = [c for _, c in dataset.read(range(shard.count))]
        good = [c for c in read if isinstance(c, Crystal)]
        assert all(equal(c, e) for c, e in zip(good, expected, strict=False))
        assert all(isinstance(c, BadCrystal) for c in read[len(good) :])


def test_a_missing_shard_is_an_error(copy):
    dataset = Dataset.open(copy)
    (copy / "val-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"cannot open shard .*val-000000\.tar"):
        list(dataset.read(dataset.split_items("val")))


def edit(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"shards": None}, "missing key 'shards'"),
        ({"splits": {"train": 1, "val": 0, "test": 0}}, "damaged"),
        ({"shards": [{"name": "../x.tar"}]}, "damaged"),
    ],
)
def test_a_strange_manifest_is_refused(copy, change, message):
    edit(copy / "manifest.json", **change)
    with pytest.raises(ValueError, match=message):
        Dataset.open(copy)


def test_hostile_shard_names_are_refused(copy):
    shards = json.loads((copy / "manifest.json").read_text())["shards"]
    shards[0]["name"] = "../train-000000.tar"
    edit(copy / "manifest.json", shards=shards)
    with pytest.raises(ValueError, match="a shard's name"):
        Manifest.load(copy)


def test_what_is_not_a_data_set_is_said_to_be_none(copy, tmp_path):
    (copy / "index.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"index\.safetensors is damaged"):
        Dataset.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Manifest.load(copy)
    (copy / "manifest.json").unlink()
    for path in (copy, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is not a data set"):
            Dataset.open(path)


def test_an_exception_leaves_nothing(tmp_path, crystals):
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "d", TARGETS) as writer:
        writer.add("train", crystals[0])
        raise RuntimeError
    with DatasetWriter(tmp_path / "d", TARGETS) as writer:
        writer.add("train", crystals[0])  # and no finish
    with pytest.raises(ValueError, match="no crystal"), DatasetWriter(tmp_path / "d", []) as writer:
        writer.finish({})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, crystals, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "d", crystals)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_is_cleaned_up_by_the_next(tmp_path, crystals, root):
    child = os.fork()
    if child == 0:
        writer = DatasetWriter(tmp_path / "d", TARGETS, shard_size=2)
        for crystal in crystals[:5]:
            writer.add("train", crystal)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [p.name for p in tmp_path.iterdir()] == [".d.partial"]
    with pytest.raises(ValueError, match="not a data set"):
        Dataset.open(tmp_path / "d")
    assert write(tmp_path / "d", crystals) == Manifest.load(root)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_two_writers_one_wins(tmp_path, crystals):
    with DatasetWriter(tmp_path / "d", TARGETS) as first:
        with pytest.raises(ValueError, match="another process is writing"):
            DatasetWriter(tmp_path / "d", TARGETS)
        first.add("train", crystals[0])
        (first.directory / "dropped.csv").write_text("id,reason\n")
        first.finish({})
    assert (tmp_path / "d" / "dropped.csv").exists()
    with pytest.raises(ValueError, match="already holds a data set"):
        DatasetWriter(tmp_path / "d", TARGETS)
    assert len(Dataset.open(tmp_path / "d")) == 1


def test_foreign_files_are_left_alone(tmp_path, crystals):
    (tmp_path / "d").mkdir()
    with DatasetWriter(tmp_path / "d", TARGETS) as writer:  # an empty directory is fine
        writer.add("train", crystals[0])
        (tmp_path / "d" / "thesis.tex").write_text("x")  # but somebody puts a file there
        with pytest.raises(ValueError, match="cannot move"):
            writer.finish({})
    with pytest.raises(ValueError, match="already holds files"):
        DatasetWriter(tmp_path / "d", TARGETS)
    with pytest.raises(ValueError, match="is a file"):
        DatasetWriter(tmp_path / "d" / "thesis.tex", TARGETS)
    assert [p.name for p in tmp_path.rglob("*")] == ["d", "thesis.tex"]


def test_bad_additions_are_refused(tmp_path, crystals):
    with DatasetWriter(tmp_path / "d", TARGETS) as writer:
        writer.add("train", crystals[0])
        with pytest.raises(ValueError, match="duplicate id 'mp-0'"):
            writer.add("val", crystals[0])
        with pytest.raises(ValueError, match="unknown split 'dev'"):
            writer.add("dev", crystals[1])
        with pytest.raises(ValueError, match="mp-1: a label is beyond"):
            writer.add("val", crystals[1].with_targets({"gap": -np.inf}))
        assert writer.finish({}).splits == {"train": 1, "val": 0, "test": 0}
    with pytest.raises(ValueError, match="shard_size"):
        DatasetWriter(tmp_path / "e", TARGETS, shard_size=0)
    with pytest.raises(ValueError, match="unique"):
        DatasetWriter(tmp_path / "e", ["gap", "gap"])
