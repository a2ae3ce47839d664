"""Data sets that are elsewhere: every source of bytes, a server that fails in every way, and copies
that several processes share."""

import fcntl
import http.server
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest

from datapipe import bytes as source
from datapipe.bytes import Access, join_path, local_path
from datapipe.cache import ShardCache, open_shard
from datapipe.schema import GraphSpec
from datapipe.shards import Dataset, DatasetWriter, Manifest
from datapipe.stream import LoaderConfig, Stream

COUNT, SHARD = 60, 10
SHARDS = [f"train-{i:06d}.tar" for i in range(COUNT // SHARD)]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(source, "FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def root(tmp_path_factory, random_crystal):
    root, rng = tmp_path_factory.mktemp("remote") / "data", np.random.default_rng(0)
    with DatasetWriter(root, ["gap"], shard_size=SHARD) as writer:
        for i in range(COUNT):
            writer.add("train", random_crystal(rng, 1 + i % 5, f"mp-{i}", {"gap": float(i)}))
        writer.finish({})
    return root


@pytest.fixture
def access(tmp_path):
    return Access(tries=3, timeout_s=30.0, cache_dir=str(tmp_path / "cache"))


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `faults` holds what goes wrong with the next requests for a file; `chance`
    gives what goes wrong with the n-th request of all."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.chance = folder, {}, lambda number: None
        self.asked, self.served = Counter(), Counter()
        self.lock, self.stalled, self.end = threading.Lock(), threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, name):
        with self.lock:
            self.asked[name] += 1
            planned = self.faults.get(name, [])
            return planned.pop(0) if planned else self.chance(sum(self.asked.values()))

    def handle_error(self, request, client_address):
        pass  # clients that were killed or gave up


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.split("?")[0].removeprefix("/")
        fault, path = self.server.next_fault(name), self.server.folder / name
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault or 404)
        elif fault == "drop":
            self.connection.close()
        else:
            self.send(name, path.read_bytes(), fault)

    def send(self, name, data, fault):
        if fault == "garbage":
            data = bytes(reversed(data))
        self.send_response(200)
        if fault != "short":  # then the end of the connection is the end of the file
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault in ("truncate", "short", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.stalled.set()
                self.server.end.wait()
        else:
            with self.server.lock:
                self.server.served[name] += fault is None
            self.wfile.write(data)

    def log_message(self, *args):
        pass


FAULTS = ["drop", "truncate", "short", "garbage", 500, 503, 429]


@pytest.fixture
def server(root):
    with Server(root) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.end.set()
        server.shutdown()
        thread.join()


def read(dataset, items=range(COUNT)):
    return [crystal.id for _, crystal in dataset.read(items)]


def kept(access):
    return sorted(p.name for p in Path(access.cache_dir).iterdir() if p.name != "lock")


# What a root may be


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/a/b", "/a/b"),
        ("a/b", "a/b"),
        ("file:/a/b", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("http://host/a", None),
        ("s3://bucket/a", None),
        ("pipe:cat /a/b", None),
    ],
)
def test_what_is_local(url, path):
    assert local_path(url) == path


def test_where_the_name_goes():
    assert join_path("/a/{}/", "n") == "/a/{}/n"
    assert join_path("s3://b/set/", "n") == "s3://b/set/n"
    assert join_path("http://h/set/{}?token=1", "n") == "http://h/set/n?token=1"
    assert join_path("pipe:aws s3 cp s3://b/{} -", "n") == "pipe:aws s3 cp s3://b/n -"
    assert join_path("pipe:cat /a", "n") == "pipe:cat /a/n"


@pytest.mark.parametrize(
    "form",
    [
        "{root}",
        "file:{root}",
        "file://{root}/",
        "{http}",
        "{http}/{{}}?token=1",
        "memory://remote",
        "pipe:cat {root}",
        "pipe:cat {root}/{{}}",
        "pipe:sh -c 'cat {root}/{{}} | cat'",
    ],
)
def test_a_data_set_may_lie_anywhere(form, root, server, access):
    memory = fsspec.filesystem("memory")
    for path in root.iterdir():
        memory.pipe(f"/remote/{path.name}", path.read_bytes())
    dataset = Dataset.open(form.format(root=root, http=server.url), access)
    assert dataset.manifest == Manifest.load(root)
    assert read(dataset) == [f"mp-{i}" for i in range(COUNT)]
    assert read(dataset, [59, 3, 4, 20]) == ["mp-59", "mp-3", "mp-4", "mp-20"]


def test_the_default_cache_is_in_the_temporary_directory(root, server, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert len(read(Dataset.open(server.url))) == COUNT
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.glob("*.tar"))) == len(SHARDS)
    assert len(read(Dataset.open(root))) == COUNT  # a local set is read where it is
    monkeypatch.setattr("os.getuid", lambda: 12345)
    folder.rename(tmp_path / "crysforge-12345")
    with pytest.raises(ValueError, match=r"somebody else's: set loader\.cache_dir"):
        read(Dataset.open(server.url))


def test_a_missing_package_or_protocol_is_named(monkeypatch):
    def missing(url, **options):
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(ValueError, match=r"warp://set/manifest.json: Protocol not known: warp"):
        Dataset.open("warp://set")
    with pytest.raises(ValueError, match=r"cannot read pipe:nonesuch .*there is no such command"):
        Dataset.open("pipe:nonesuch x")
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for url, package in (("s3://b/set", "s3fs"), ("gs://b/set", "gcsfs")):
        with pytest.raises(ValueError, match=f"it needs the package {package}: pip install"):
            Dataset.open(url)


# A command


def test_a_command_that_fails_is_tried_again(root, tmp_path, access):
    mark = tmp_path / "mark"
    script = tmp_path / "flaky.sh"
    script.write_text(f'[ -e {mark} ] && exec cat "$1"; touch {mark}; echo half; exit 1')
    assert Manifest.load(f"pipe:sh {script} {root}", access) == Manifest.load(root)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sh -c 'echo oh dear >&2; exit 7' {}", r"try 2 of 2.*sh ended with status 7: oh dear"),
        ("sh -c 'sleep 1000 & wait' {}", r"try 2 of 2.*sh has not ended after 0\.1 s"),
        ("sh -c 'printf 0123 && exit 0' {}", r"manifest\.json|damaged|schema"),
    ],
)
def test_a_command_that_cannot_do_it_is_one_clear_error(command, message):
    with pytest.raises(ValueError, match=message):
        Dataset.open(f"pipe:{command}", Access(tries=2, timeout_s=0.1))


# A server that fails


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors", SHARDS[2]])
def test_a_fault_that_passes_is_survived(server, access, fault, name, caplog):
    server.faults[name] = [fault, fault]
    assert read(Dataset.open(server.url, access)) == [f"mp-{i}" for i in range(COUNT)]
    assert server.asked[name] == 3
    warnings = [r.getMessage() for r in caplog.records if r.name == "datapipe.bytes"]
    assert len(warnings) == 2 or fault == "drop"  # once the client library asks again by itself
    assert all(f"cannot read {server.url}/{name}" in w for w in warnings)


def test_a_server_that_hangs_is_given_up_and_asked_again(server, access):
    dataset = Dataset.open(server.url, access).through(
        Access(tries=2, timeout_s=0.2, cache_dir=access.cache_dir)
    )
    server.faults[SHARDS[0]] = ["stall"]
    assert read(dataset, range(SHARD)) == [f"mp-{i}" for i in range(SHARD)]
    assert server.asked[SHARDS[0]] == 2
    server.faults[SHARDS[1]] = ["stall", "stall"]
    with pytest.raises(ValueError, match=r"train-000001\.tar.*\(try 2 of 2\).*Timeout"):
        read(dataset)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_that_stays_is_one_clear_error(server, access, fault):
    dataset = Dataset.open(server.url, access)
    server.faults[SHARDS[3]] = [fault] * 6
    where = rf"cannot read {server.url}/{SHARDS[3]} \(try 3 of 3\)"
    with pytest.raises(ValueError, match=where) as caught:
        read(dataset)
    if fault in ("short", "garbage"):
        assert "the shard is damaged or of another data set; upload it again" in str(caught.value)
    assert len(kept(access)) == 3  # and nothing half
    server.faults.clear()
    assert len(read(dataset)) == COUNT
    server.faults["manifest.json"] = [fault] * 6
    with pytest.raises(ValueError, match=rf"{server.url}.*manifest\.json"):
        Dataset.open(server.url, access)


@pytest.mark.parametrize("fault", [403, 404])
def test_a_refusal_is_not_asked_again(server, access, fault):
    dataset = Dataset.open(server.url, access)
    server.faults = {SHARDS[1]: [fault], "manifest.json": [fault]}
    with pytest.raises(ValueError, match=rf"cannot open shard {server.url}/{SHARDS[1]}"):
        read(dataset)
    message = "is not a data set" if fault == 404 else r"cannot read .*manifest\.json: .*403"
    with pytest.raises(ValueError, match=message):
        Dataset.open(server.url, access)
    assert server.asked[SHARDS[1]] == 1


def test_a_server_that_is_not_there(access):
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9.*try 3 of 3"):
        Dataset.open("http://127.0.0.1:9", access)


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
    monkeypatch.setattr("shutil.copyfile", full)
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
    server.chance = lambda number: FAULTS[number % len(FAULTS)] if number % 3 == 0 else None
    access = Access(tries=20, cache_dir=access.cache_dir)
    assert in_processes(6, server.url, access, shuffle) == [True] * 6
    assert [server.served[name] for name in SHARDS] == [1] * len(SHARDS)


def test_processes_share_a_cache_that_is_too_small(server, access, root):
    server.chance = lambda number: FAULTS[number % len(FAULTS)] if number % 5 == 0 else None
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
            workers=workers, shuffle=shuffle, tries=9, cache_dir=str(tmp_path / "cache")
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
    server.chance = lambda number: FAULTS[number % len(FAULTS)] if number % 4 == 0 else None
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
