"""Copies of shards on a local disk, shared by all processes of a machine.

A copy is named by its size and sha256 and gets its name when both are found right, so a name is a
promise, whatever URL it came from. Everything else is file locks, which the system drops when a
process dies: who downloads holds its file exclusively, who reads holds it shared, and only what
nobody holds is removed, the longest unused first, when there is no room.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import BinaryIO

from crysforge.datapipe.storage.manifest import Shard
from crysforge.datapipe.storage.remote import (
    DISK_FULL,
    Access,
    download,
    join_path,
    local_path,
)

_ENTRY = re.compile(r"(\d+)-[0-9a-f]{64}\.(tar|partial)")
"""Final size in bytes, sha256, and whether it is all there."""


def open_shard(root: str | os.PathLike, shard: Shard, access: Access) -> BinaryIO:
    """A shard of the data set at `root`, opened for reading. Remote ones are copied first, and so
    are local ones where `access` names a directory for it.

    Raises:
        OSError: missing or not readable; a copy that is not what the manifest says.
        ValueError: the cache is too small, full or not ours.
    """
    url = join_path(root, shard.name)
    path = local_path(url)
    if path is not None and access.cache_dir is None:
        return open(path, "rb")
    return ShardCache(access).open(url, shard)


class ShardCache:
    """The copies in one directory.

    Args:
        access: directory (None: `crysforge-USER` in the temporary directory), size, retries.

    Raises:
        ValueError: the directory cannot be made, or is somebody else's.
    """

    def __init__(self, access: Access) -> None:
        self.access, self.limit = access, int(access.cache_gb * 1e9)
        own = access.cache_dir is None
        default = Path(tempfile.gettempdir()) / f"crysforge-{os.getuid()}"
        self.directory = default if own else Path(access.cache_dir or "")
        try:
            self.directory.mkdir(mode=0o700 if own else 0o777, parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot make the cache directory {self.directory}: {error.strerror}: set "
                "loader.cache_dir to a directory on a local disk"
            ) from None
        if own and self.directory.stat().st_uid != os.getuid():
            raise ValueError(f"{self.directory} is somebody else's: set loader.cache_dir")

    def open(self, url: str, shard: Shard) -> BinaryIO:
        """A copy of the shard, made now if there is none. It stays while it is open."""
        path = self.directory / f"{shard.bytes}-{shard.sha256}.tar"
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = open(path, "rb")  # noqa: SIM115  (it is what we return)
                fcntl.flock(file, fcntl.LOCK_SH)  # removed before? Then we read on without a name
                if os.fstat(file.fileno()).st_size == shard.bytes:
                    with contextlib.suppress(FileNotFoundError, PermissionError):
                        os.utime(path)  # used last now
                    return file
                file.close()
                path.unlink()  # somebody tampered with it
            self._make(path, url, shard)

    def _make(self, path: Path, url: str, shard: Shard) -> None:
        """Downloads a shard, or waits until another process has done so, or given up."""
        partial = path.with_suffix(".partial")
        with open(partial, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, partial):
                return
            if path.exists():  # it was finished just before we came
                partial.unlink()
                return
            try:
                self._make_room(shard)
                whole = lambda copy: check(copy, shard)  # noqa: E731
                download(url, partial, self.access, whole, shard.bytes)
                os.fsync(file.fileno())
                partial.rename(path)
            except BaseException as error:
                partial.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise ValueError(
                        f"the disk of {self.directory} is full: free some space, lower "
                        "loader.cache_gb or set loader.cache_dir"
                    ) from None
                raise

    def _make_room(self, shard: Shard) -> None:
        """Removes the copies that were not used for longest until all that is here, with what is
        being downloaded, is within the limit or in use."""
        if shard.bytes > self.limit:
            raise ValueError(
                f"loader.cache_gb={self.access.cache_gb:g} is too small for {shard.name} of "
                f"{shard.bytes / 1e9:.2g} GB"
            )
        with open(self.directory / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for entry in os.scandir(self.directory):
                match = _ENTRY.fullmatch(entry.name)
                if match:
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.stat().st_mtime_ns, int(match[1]), Path(entry.path)))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self.limit:
                    break
                total -= size if _remove_unused(path) else 0


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Removes a file unless a process holds it; whether it is gone."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, PermissionError):
        return False
    except FileNotFoundError:
        pass
    return True


def check(path: Path, shard: Shard) -> None:
    """Holds a copy of a shard against the manifest.

    Raises:
        ValueError: it is not the shard.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if (size, digest.hexdigest()) != (shard.bytes, shard.sha256):
        raise ValueError(
            f"got {size} bytes with sha256 {digest.hexdigest()[:12]}…, the manifest says "
            f"{shard.bytes} and {shard.sha256[:12]}…: the shard is damaged or of another data "
            "set; upload it again"
        )
