"""Faults on the way from files to batches: never a wrong crystal, and what is lost has a name and
is counted."""

import os
import re
import shutil
import tarfile
from itertools import islice

import numpy as np
import pytest

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.loading.config import LoaderConfig
from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage import writer as writing
from crysforge.datapipe.storage.dataset import Dataset, encode
from tests.damage import COUNT, SHARD, lost, write

SPEC = GraphSpec(neighbors=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory, crystals):
    root = tmp_path_factory.mktemp("faults") / "data"
    write(root, crystals)
    return root


@pytest.fixture
def copy(tmp_path, root):
    """A data set to damage."""
    return shutil.copytree(root, tmp_path / "copy")


def overwrite(path, start, data):
    """Writes into a file in place, which is many times faster than writing it anew."""
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


def entries(dataset, path):
    """Where the entries of a one-split shard start, and where the last ends."""
    first = int(path.name.split("-")[1].split(".")[0]) * SHARD
    starts = dataset._offset[first : first + SHARD].tolist()
    return [*starts, os.path.getsize(path)]


# Damage to shards


def test_flipped_bytes_1000_times_cost_the_crystals_they_hit(copy, crystals):
    """Bursts of 1 to 32 bytes in random places of random shards."""
    dataset, rng = Dataset.open(copy), np.random.default_rng(1)
    paths = [copy / s.name for s in dataset.manifest.shards]
    sound = [p.read_bytes() for p in paths]
    starts = [entries(dataset, p) for p in paths]
    count = 0
    for _ in range(1000):
        shard = int(rng.integers(len(paths)))
        begin = int(rng.integers(len(sound[shard])))
        was = sound[shard][begin : begin + int(rng.integers(1, 33))]
        end = begin + len(was)
        flips = rng.integers(1, 256, len(was), dtype=np.uint8)
        overwrite(paths[shard], begin, (np.frombuffer(was, np.uint8) ^ flips).tobytes())
        gone = lost(dataset, crystals, range(SHARD * shard, SHARD * (shard + 1)))
        overwrite(paths[shard], begin, was)
        hit = np.searchsorted(starts[shard], [begin, end - 1], side="right") - 1
        assert {i - SHARD * shard for i in gone} <= set(range(hit[0], hit[1] + 1))
        count += len(gone)
    assert count > 700  # padding and unused header fields may change unseen


def test_truncation_at_every_boundary_costs_what_lies_behind(copy, crystals):
    dataset = Dataset.open(copy)
    path = copy / dataset.manifest.shards[1].name
    sound = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [m.offset_data + m.size for m in tar]
    near = [*entries(dataset, path), *(start + 512 for start in entries(dataset, path)), *ends]
    for length in sorted({max(0, at + step) for at in near for step in (-1, 0, 1)}):
        overwrite(path, 0, sound)
        os.truncate(path, length)
        whole = sum(end <= length for end in ends)
        gone = lost(dataset, crystals, range(SHARD, 2 * SHARD))
        assert gone == list(range(SHARD + whole, 2 * SHARD))


def test_shards_that_were_exchanged_give_no_wrong_crystal(copy, crystals, tmp_path, random_crystal):
    dataset = Dataset.open(copy)
    first, second = (copy / s.name for s in dataset.manifest.shards[:2])
    first.rename(copy / "x"), second.rename(first), (copy / "x").rename(second)
    assert lost(dataset, crystals, range(COUNT)) == list(range(2 * SHARD))
    rng = np.random.default_rng(7)
    write(tmp_path / "other", [random_crystal(rng, 3, f"x-{i}") for i in range(SHARD)])
    shutil.copy(tmp_path / "other" / first.name, first)
    assert lost(dataset, crystals, range(SHARD)) == list(range(SHARD))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused_before_anything_is_read(copy, version):
    text = (copy / "manifest.json").read_text()
    assert '"schema_version": 1' in text
    for path in copy.iterdir():
        path.unlink()
    value = "null" if version is None else repr(version).replace("'", '"')
    (copy / "manifest.json").write_text(
        text.replace('"schema_version": 1', f'"schema_version": {value}')
    )
    with pytest.raises(ValueError, match=f"schema version {version!r}, this code reads 1: prepare"):
        Dataset.open(copy)


# Quarantine


def flip_member(root):
    path = root / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b'"mp-20"') + 1] ^= 1
    path.write_bytes(data)


def truncate(root):
    path = root / "train-000002.tar"
    os.truncate(path, entries(Dataset.open(root), path)[11] + 700)


def rewrite(root, change):
    """The data set with one record other than `encode` makes it, its checksums right."""
    crystals = [c for _, c in Dataset.open(root).read(range(COUNT))]
    shutil.rmtree(root)

    def bad(crystal, targets, more):
        return change(crystal, targets) if crystal.id == "mp-20" else encode(crystal, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "encode", bad)
        write(root, crystals)


def nan(crystal, targets):
    frac = crystal.frac_coords.copy()
    frac[0, 1] = np.nan
    return encode(Crystal(crystal.id, crystal.numbers, frac, crystal.lattice), targets)


BAD = {
    "corrupt member": (flip_member, [20], "its checksum is not the index's"),
    "truncated shard": (truncate, [41, 42, 43, 44], "damaged|lost in damage"),
    "undecodable record": (
        lambda root: rewrite(root, lambda c, t: b"\x00" * 500),
        [20],
        "not a crystal record",
    ),
    "NaN": (lambda root: rewrite(root, nan), [20], "mp-20: coordinates.* not finite"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [1000, 12])
@pytest.mark.parametrize("kind", BAD)
def test_what_is_bad_is_named_counted_and_passed_over(copy, kind, shuffle, workers):
    damage, items, reason = BAD[kind]
    damage(copy)

    def run(max_bad):
        config = LoaderConfig(workers=workers, shuffle=shuffle, max_bad=max_bad)
        stream = Stream(Dataset.open(copy), "train", SPEC, config, batch_size=9)
        ids = [i for batch in islice(stream, 2 * COUNT // 9) for i in batch.ids]
        stream.close()
        return ids, stream

    ids, stream = run(len(items))
    names = [f"mp-{i}" for i in range(COUNT) if i not in items]
    assert sorted(ids) == sorted(2 * names)
    assert sorted(q.item for q in stream.quarantined) == items
    for entry in stream.quarantined:
        where = f"train-{entry.item // SHARD:06d}.tar entry {entry.item % SHARD}"
        assert re.search(f"{where}.*({reason})", entry.reason)
    limit = len(items) - 1
    with pytest.raises(ValueError, match=rf"more than loader\.max_bad={limit}; .*train-00000"):
        run(limit)


# Few crystals


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("count", "shard_size"), [(1, 9), (3, 9), (45, 1000), (45, 15)])
def test_fewer_shards_than_readers(tmp_path, crystals, count, shard_size, workers, world_size):
    """One shard, and sets smaller than a batch, for up to 12 readers."""
    write(tmp_path / "d", crystals[:count], shard_size)
    dataset, config = Dataset.open(tmp_path / "d"), LoaderConfig(workers=workers, shuffle=8)

    def batches(train):
        ranks = [
            Stream(
                dataset,
                "train",
                SPEC,
                config,
                batch_size=12,
                rank=rank,
                world_size=world_size,
                epochs=4,
                train=train,
            )
            for rank in range(world_size)
        ]
        found = [[b.ids for b in s if not b.is_dummy] for s in ranks]
        for stream in ranks:
            stream.close()
        return found

    training = batches(train=True)
    assert {len(ids) for rank in training for ids in rank} == {12 // world_size}
    assert {len(rank) for rank in training} == {-(-4 * count // 12)}
    ids = [i for rank in training for step in rank for i in step]
    assert {i: ids.count(i) >= 4 for i in ids} == {c.id: True for c in crystals[:count]}
    once = [i for rank in batches(train=False) for step in rank for i in step]
    assert sorted(once) == sorted(c.id for c in crystals[:count])
