"""Copies of shards that are elsewhere: used again, removed in turn, shared by processes."""

import fcntl
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from crysforge.datapipe.loading.config import LoaderConfig
from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage import remote as source
from crysforge.datapipe.storage.cache import ShardCache, open_shard
from crysforge.datapipe.storage.dataset import Dataset, Manifest
from crysforge.datapipe.storage.remote import Access
from tests.serving import COUNT, SHARD, SHARDS, kept, read

FORK = multiprocessing.get_context("fork")


# Copies


def test_copies_are_used_again_whatever_the_url(root, server, access):
    read(Dataset.open(server.url, access))
    assert read(Dataset.open(f"{server.url}/{{}}?token=2", access)) == read(Dataset.open(root))
    assert [server.asked[name] for name in SHARDS] == [1] * len(SHARDS)


def test_a_copy_that_was_finished_in_the_meantime_is_not_made_again(root, server, access):
    shard, cache = Manifest.load(root).shards[0], ShardCache(access)
    url = f"{server.url}/{shard.name}"
    cache.open(url, shard).close()
    cache._make(Path(access.cache_dir) / kept(access)[0], url, shard)  # as one who looked before
    assert server.asked[shard.name] == 1
    assert len(kept(access)) == 1


def test_local_shards_are_copied_when_a_directory_is_named(root, access, tmp_path):
    for path in root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    dataset = Dataset.open(tmp_path, access)
    read(dataset)
    for name in SHARDS:
        (tmp_path / name).unlink()
    assert len(read(dataset)) == COUNT


def test_a_copy_of_the_wrong_size_is_fetched_anew(server, access):
    dataset = Dataset.open(server.url, access)
    read(dataset)
    for path in Path(access.cache_dir).glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-1])
    assert read(dataset) == [f"mp-{i}" for i in range(COUNT)]
    assert [server.served[name] for name in SHARDS] == [2] * len(SHARDS)


def test_what_is_left_of_a_killed_download_does_not_matter(server, access):
    dataset = Dataset.open(server.url, access)
    server.faults[SHARDS[0]] = ["stall"]
    child = FORK.Process(target=read, args=(dataset,))
    child.start()
    assert server.stalled.wait(60)
    (partial,) = kept(access)
    assert partial.endswith(".partial")
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert kept(access) == [partial]
    assert len(read(dataset)) == COUNT
    assert all(name.endswith(".tar") for name in kept(access))


def sized(access, shards, count):
    """Access with room for so many of the shards, and a little more."""
    limit = max(s.bytes for s in shards) * (count + 0.5)
    return Access(tries=3, cache_dir=access.cache_dir, cache_gb=limit / 1e9)


def test_what_was_not_used_for_longest_goes_first(root, access):
    shards = Manifest.load(root).shards
    access = sized(access, shards, 3)

    def use(number, time):
        open_shard(root, shards[number], access).close()
        path = Path(access.cache_dir) / f"{shards[number].bytes}-{shards[number].sha256}.tar"
        os.utime(path, (time, time))

    def held():
        return [i for i, s in enumerate(shards) if f"{s.bytes}-{s.sha256}.tar" in kept(access)]

    for time, (number, expected) in enumerate(
        [(0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (0, [0, 1, 2]), (3, [0, 2, 3]), (1, [0, 1, 3])]
    ):
        use(number, time)
        assert held() == expected
    (Path(access.cache_dir) / "thesis.tex").write_text("x" * 100_000)  # not ours to count
    use(4, 9)
    assert held() == [1, 3, 4] and "thesis.tex" in kept(access)


def test_what_is_in_use_stays(root, access):
    shards = Manifest.load(root).shards
    access = sized(access, shards, 2)
    files = [open_shard(root, shard, access) for shard in shards]
    assert len(kept(access)) == len(shards)
    for file, shard in zip(files, shards, strict=True):
        assert file.read() == (root / shard.name).read_bytes()
        file.close()
    open_shard(root, shards[0], access).close()  # is there already, so nothing is done
    assert len(kept(access)) == len(shards)
    Path(access.cache_dir, kept(access)[0]).unlink()
    for shard in shards:
        open_shard(root, shard, access).close()
    assert len(kept(access)) == 2


def test_a_cache_that_cannot_work_says_so(root, access, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    shard = Manifest.load(root).shards[0]
    with pytest.raises(ValueError, match=r"cache_gb=1e-06 is too small for train-000000\.tar"):
        open_shard(root, shard, Access(cache_dir=access.cache_dir, cache_gb=1e-6))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot make the cache directory .*loader\.cache_dir"):
        open_shard(root, shard, Access(cache_dir=str(tmp_path / "file" / "x")))
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(ValueError, match=r"is full: free some space, lower loader\.cache_gb"):
        open_shard(root, shard, access)
    assert kept(access) == []


# Several processes


def read_in_order(url, access, seed, shuffle, results):
    """Reads all shards in an order of its own; reports what was wrong."""
    source.FIRST_WAIT = 0.001
    logging.disable()
    try:
        dataset = Dataset.open(url, access)
        shards = np.random.default_rng(seed).permutation(len(SHARDS)) if shuffle else range(6)
        items = [i for s in shards for i in range(s * SHARD, (s + 1) * SHARD)]
        results.put(read(dataset, items) == [f"mp-{i}" for i in items])
    except Exception as error:
        results.put(repr(error))


def in_processes(count, *args):
    results = FORK.Queue()
    processes = [
        FORK.Process(target=read_in_order, args=(args[0], args[1], n, *args[2:], results))
        for n in range(count)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_process_downloads_and_the_others_wait(server, access, shuffle):
    server.flaky = True
    assert in_processes(6, server.url, access, shuffle) == [True] * 6
    assert [server.served[name] for name in SHARDS] == [1] * len(SHARDS)


def test_processes_share_a_cache_that_is_too_small(server, access, root):
    server.flaky = True
    access = sized(Access(cache_dir=access.cache_dir), Manifest.load(root).shards, 2)
    assert in_processes(6, server.url, access, True) == [True] * 6
    files = [Path(access.cache_dir, name) for name in kept(access)]
    assert len(files) <= 6 and all(f.suffix == ".tar" for f in files)
    for file in files:
        with open(file, "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [1000, 12])
def test_the_loader_gives_the_same_batches_from_far(root, server, tmp_path, shuffle, workers):
    def batches(where, rank):
        config = LoaderConfig(
            workers=workers, shuffle=shuffle, tries=3, cache_dir=str(tmp_path / "cache")
        )
        spec = GraphSpec(neighbors=4, pdd=4, depth=2)
        stream = Stream(
            Dataset.open(where), "train", spec, config, batch_size=8, rank=rank, world_size=2
        )
        found = [batch.ids for batch, _ in zip(stream, range(12), strict=False)]
        assert stream.quarantined == []
        return found

    expected = [batches(root, rank) for rank in range(2)]
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    server.flaky = True
    assert [batches(server.url, rank) for rank in range(2)] == expected
    assert [server.served[name] for name in SHARDS] == [1] * len(SHARDS)


def test_a_loader_whose_server_has_gone_stops_with_one_clear_error(server, tmp_path):
    config = LoaderConfig(workers=2, tries=2, cache_dir=str(tmp_path / "cache"))
    stream = Stream(Dataset.open(server.url), "train", GraphSpec(neighbors=4), config, batch_size=4)
    server.faults[SHARDS[4]] = [500] * 10
    with pytest.raises(ValueError, match=rf"^cannot open shard {server.url}/{SHARDS[4]}: cannot"):
        next(iter(stream))


def test_settings_out_of_range():
    for name in ("tries", "timeout_s", "cache_gb"):
        with pytest.raises(ValueError, match=rf"loader\.{name} must be"):
            LoaderConfig(**{name: 0})
