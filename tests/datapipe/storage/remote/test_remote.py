"""Data sets that are elsewhere: every source of bytes, and a server that fails in every way."""

from pathlib import Path

import fsspec
import pytest

from crysforge.datapipe.storage.dataset import Dataset, Manifest
from crysforge.datapipe.storage.remote import Access, join_path, local_path
from tests.serving import COUNT, FAULTS, SHARD, SHARDS, kept, read

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
    ("command", "timeout_s", "message"),
    [
        ("sh -c 'echo oh dear >&2; exit 7' {}", 60, r"try 2 of 2.*sh ended with status 7: oh dear"),
        ("sh -c 'sleep 1000 & wait' {}", 0.1, r"try 2 of 2.*sh has not ended after 0\.1 s"),
        ("sh -c 'printf 0123 && exit 0' {}", 60, r"try 2 of 2.*manifest.json is not valid JSON"),
    ],
)
def test_a_command_that_cannot_do_it_is_one_clear_error(command, timeout_s, message):
    with pytest.raises(ValueError, match=message):
        Dataset.open(f"pipe:{command}", Access(tries=2, timeout_s=timeout_s))


# A server that fails


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors", SHARDS[2]])
def test_a_fault_that_passes_is_survived(server, access, fault, name, caplog):
    server.faults[name] = [fault, fault]
    assert read(Dataset.open(server.url, access)) == [f"mp-{i}" for i in range(COUNT)]
    assert server.asked[name] == 3
    warnings = [
        r.getMessage() for r in caplog.records if r.name == "crysforge.datapipe.storage.remote"
    ]
    assert len(warnings) == 2 or fault == "drop"  # once the client library asks again by itself
    assert all(f"cannot read {server.url}/{name}" in w for w in warnings)


def test_a_server_that_hangs_is_given_up_and_asked_again(server, access):
    dataset = Dataset.open(server.url, access)

    def patient(tries):  # on a slow machine sound answers may be given up, too
        return dataset.through(Access(tries=tries, timeout_s=0.3, cache_dir=access.cache_dir))

    server.faults[SHARDS[0]] = ["stall"]
    assert read(patient(10), range(SHARD)) == [f"mp-{i}" for i in range(SHARD)]
    assert server.asked[SHARDS[0]] >= 2
    server.faults[SHARDS[1]] = ["stall", "stall"]
    with pytest.raises(ValueError, match=r"train-000001\.tar.*\(try 2 of 2\).*Timeout"):
        read(patient(2))


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


@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors", SHARDS[2]])
@pytest.mark.parametrize("fault", ["endless", "announced"])
def test_no_more_is_taken_than_a_file_may_have(server, access, fault, name, monkeypatch):
    monkeypatch.setattr("crysforge.datapipe.storage.manifest.MAX_MANIFEST", 1 << 20)
    server.faults[name] = [fault] * 6
    with pytest.raises(ValueError, match=rf"{name} \(try 3 of 3\): .*longer than the \d+ bytes"):
        read(Dataset.open(server.url, access))
    assert server.endless < 3 * 50e6  # what the sockets hold comes on top
    assert not list(Path(access.cache_dir).glob("*.partial"))


def test_no_more_is_taken_from_a_command_or_a_path(root, access, tmp_path):
    (tmp_path / "longer").mkdir()
    for path in root.iterdir():
        (tmp_path / "longer" / path.name).write_bytes(path.read_bytes())
    with open(tmp_path / "longer" / SHARDS[0], "ab") as file:
        file.truncate(1 << 40)  # a hole
    for url in (str(tmp_path / "longer"), f"pipe:sh -c 'cat {root}/{{}} && exec cat /dev/zero'"):
        name = "manifest.json" if url.startswith("pipe") else SHARDS[0]
        with pytest.raises(ValueError, match=rf"{name}.*longer than the \d+ bytes"):
            read(Dataset.open(url, access))


def test_what_a_command_says_and_leaves_behind(root, access):
    """Its last words are in the error, however many there were; a child of it holds nothing up."""
    loud = "pipe:sh -c 'head -c 3000000 /dev/zero >&2; echo oh dear >&2; exit 3' {}"
    with pytest.raises(ValueError, match=r"ended with status 3: .*oh dear"):
        Dataset.open(loud, access)
    assert Manifest.load(f"pipe:sh -c 'cat {root}/{{}}; sleep 3 &'", access)


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
