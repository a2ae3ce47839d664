"""Copies in a cache that others can write."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.storage.cache import ShardCache
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import Manifest
from crysforge.datapipe.storage.remote import Access

SET = Path(__file__).resolve().parents[3] / "data" / "schema-1" / "set"


@pytest.fixture
def shared(tmp_path) -> Access:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o775)
    return Access(cache_dir=str(tmp_path / "shared"), tries=1)


def ids(access: Access) -> list[str]:
    data = Dataset.open(SET, access)
    return [c.id for _, c in data.read(range(len(data))) if isinstance(c, Crystal)]


def test_where_others_write_a_copy_is_trusted_by_its_hash(shared):
    whole = ids(shared)
    assert len(whole) == 24
    for path in Path(shared.cache_dir).glob("*.tar"):
        content = bytearray(path.read_bytes())
        content[700] ^= 1  # of the same size, and the index's checksums can be forged
        times = path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ids(shared) == whole
    (Path(shared.cache_dir)).chmod(0o755)
    assert ids(shared) == whole  # now by size, as every copy is ours


def test_a_copy_that_was_trusted_is_not_for_good(shared):
    folder = Path(shared.cache_dir)
    folder.chmod(0o700)
    whole = ids(shared)
    for path in folder.glob("*.tar"):
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
    folder.chmod(0o775)
    assert ids(shared) == whole


def test_hashing_is_done_once(shared, monkeypatch):
    shard = Manifest.load(SET).shards[0]
    cache, url = ShardCache(shared), str(SET / shard.name)
    cache.open(url, shard).close()
    read = []
    monkeypatch.setattr(
        "crysforge.datapipe.storage.cache._digest", lambda file: read.append(1) or shard.sha256
    )
    for _ in range(3):
        assert cache.open(url, shard).read(4)
    assert not read  # it was read when it was made, or first opened
    path = Path(shared.cache_dir) / f"{shard.bytes}-{shard.sha256}.tar"
    path.write_bytes(path.read_bytes())
    cache.open(url, shard).close()
    assert len(read) == 1


@pytest.mark.parametrize("name", ["{}.partial", "lock"])
def test_a_second_name_of_another_file_is_none_of_a_copy(name, shared, tmp_path):
    """Where the system lets others link files of ours."""
    shard = Manifest.load(SET).shards[0]
    victim = tmp_path / "thesis.tex"
    victim.write_text("mine")
    os.link(victim, Path(shared.cache_dir) / name.format(f"{shard.bytes}-{shard.sha256}"))
    with pytest.raises(ValueError, match="somebody tampers there"):
        ShardCache(shared).open(str(SET / shard.name), shard)
    assert victim.read_text() == "mine"


def test_making_room_opens_no_links(shared, tmp_path):
    """Of what others put there under the name of a copy, only that goes."""
    shard = Manifest.load(SET).shards[0]
    os.mkfifo(tmp_path / "pipe")
    other = Path(shared.cache_dir) / f"9-{'0' * 64}.tar"
    other.symlink_to(tmp_path / "pipe")
    access = replace(shared, cache_gb=1.5 * shard.bytes / 1e9)
    (Path(shared.cache_dir) / f"{shard.bytes}-{'1' * 64}.tar").write_bytes(b"0" * shard.bytes)
    ShardCache(access).open(str(SET / shard.name), shard).close()
    assert other.is_symlink() and not list(Path(shared.cache_dir).glob(f"*-{'1' * 64}.tar"))


@pytest.mark.parametrize("name", ["{}.tar", "{}.partial", "lock"])
def test_links_that_others_put_into_a_cache_lead_nowhere(name, shared, tmp_path):
    shard = Manifest.load(SET).shards[0]
    victim = tmp_path / "thesis.tex"
    victim.write_text("mine")
    planted = Path(shared.cache_dir) / name.format(f"{shard.bytes}-{shard.sha256}")
    planted.symlink_to(victim)
    with pytest.raises(ValueError, match="somebody tampers there"):
        ShardCache(shared).open(str(SET / shard.name), shard)
    assert victim.read_text() == "mine"


def test_a_copy_that_belongs_to_somebody_else_is_named(shared, monkeypatch):
    shard = Manifest.load(SET).shards[0]
    path = Path(shared.cache_dir) / f"{shard.bytes}-{shard.sha256}.tar"
    path.write_bytes(b"\0" * shard.bytes)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)  # as in a directory with the sticky bit
    with pytest.raises(ValueError, match="is not what its name says, and somebody else's"):
        ShardCache(shared).open(str(SET / shard.name), shard)
