"""Copies of shards on a local disk, shared by all processes of a machine.

A copy is renamed to its final name, its size and sha256, only after both match, so any file with a
final name is valid, whatever URL it came from; where others can write as well, it is checked again.
Everything else is file locks, which the system drops when a process dies: who downloads holds its
file exclusively, who reads holds it shared, and only what nobody holds is removed, the longest
unused first, when there is no room. Where the file system has no locks, who downloads names itself
beside its file, and what was opened within an hour is in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from crysforge.datapipe.common.files import DISK_FULL
from crysforge.datapipe.common.locks import flock, is_at
from crysforge.datapipe.common.owners import OwnerFile, owner_of
from crysforge.datapipe.storage.manifest import Shard
from crysforge.datapipe.storage.remote import Access, download, join_path, local_path, open_local

_ENTRY = re.compile(r"(\d+)-[0-9a-f]{64}\.(tar|partial)")
"""Final size in bytes, sha256, and whether it is all there."""
IN_USE_S = 3600.0
"""Seconds from its last opening during which a copy counts as in use, where there are no locks."""
TOUCH_S = 600.0
"""Seconds after which a use of a copy that others can write to is noted again."""


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
        return open_local(path)
    return ShardCache(access).open(url, shard)


class ShardCache:
    """The copies in one directory.

    Where others can write, a copy is held against the manifest's hash before its first use in a
    process, and again whenever it was touched since; elsewhere its size is enough.

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
            found = self.directory.lstat() if own else self.directory.stat()
        except OSError as error:
            raise ValueError(
                f"cannot make the cache directory {self.directory}: {error.strerror}: set "
                "loader.cache_dir to a directory on a local disk"
            ) from None
        if own and (found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode)):
            raise ValueError(f"{self.directory} is somebody else's: set loader.cache_dir")
        self.shared = found.st_uid not in (0, os.getuid()) or bool(found.st_mode & 0o022)
        """Whether somebody else can put files there."""
        self.closed = not found.st_mode & 0o011
        """Whether nobody else can reach what is in it."""

    def open(self, url: str, shard: Shard) -> BinaryIO:
        """A copy of the shard, made now if there is none. It stays while it is open."""
        name = f"{shard.bytes}-{shard.sha256}.tar"
        assert _ENTRY.fullmatch(name), (
            f"{name} is no copy's name"
        )  # see `datapipe.storage.manifest`
        path = self.directory / name
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = _open(path, "rb")
                flock(file.fileno(), fcntl.LOCK_SH)  # already removed? We read on without a name
                if self._is_sound(file, shard):
                    return file
                file.close()
                try:
                    path.unlink()  # somebody tampered with it
                except PermissionError:
                    raise ValueError(
                        f"{path} is not what its name says, and somebody else's: set "
                        "loader.cache_dir to another directory"
                    ) from None
            self._make(path, url, shard)

    def _is_sound(self, file: BinaryIO, shard: Shard) -> bool:
        """Whether an open copy is what its name says; if so, it was used last now."""
        found = os.fstat(file.fileno())
        if found.st_size != shard.bytes:
            return False
        theirs = found.st_uid not in (0, os.getuid())
        theirs |= bool(found.st_mode & 0o022) and not self.closed
        doubted = self.shared or theirs
        if doubted and _SEEN.get(shard.sha256) != _state(found):
            if _digest(file) != shard.sha256:
                return False
            file.seek(0)
        if not doubted or time.time() - found.st_mtime > TOUCH_S:  # the others read it again, too
            with contextlib.suppress(PermissionError):
                os.utime(file.fileno())
        if doubted:
            _SEEN[shard.sha256] = _state(os.fstat(file.fileno()))
        return True

    def _make(self, path: Path, url: str, shard: Shard) -> None:
        """Downloads a shard, or waits until another process has done so, or given up."""
        partial = path.with_suffix(".partial")
        with _alone(partial) as file:
            if not is_at(file.fileno(), partial):
                return
            if path.exists():  # it was finished just before we came
                partial.unlink()
                return
            try:
                self._make_room(shard)
                place = _place(file, partial)
                whole = lambda copy: check(copy, shard)  # noqa: E731
                download(url, place, self.access, whole, shard.bytes)
                os.fsync(file.fileno())
                if is_at(file.fileno(), partial):
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
        with _alone(self.directory / "lock"):
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


_FLAGS = {"rb": os.O_RDONLY, "r+b": os.O_RDWR, "ab": os.O_WRONLY | os.O_APPEND | os.O_CREAT}
_SEEN: dict[str, tuple[int, ...]] = {}
"""Copies by hash that this process has read as a whole, as they were then."""


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """A file, made if need be, that one process at a time has; waits for it."""
    with _open(path, "ab") as file:
        if flock(file.fileno(), fcntl.LOCK_EX):
            yield file
            return
    with OwnerFile.waited_for(owner_of(path)), _open(path, "ab") as file:
        yield file


def _state(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to, or is another one."""
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _open(path: Path, mode: str) -> BinaryIO:
    """Opens a file, to read (`rb`), append (`ab`) or lock (`r+b`), where others may have put a link
    or a pipe in its place, or another file of ours under a second name."""
    flags = _FLAGS[mode] | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and (mode == "rb" or found.st_nlink < 2):
            return typing.cast(BinaryIO, open(descriptor, mode))
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
    raise ValueError(f"{path} is no file of its own but a link or pipe: somebody tampers there")


def _place(file: BinaryIO, path: Path) -> Path:
    """A path that stands for an open file, whatever has its name now, where the system has one."""
    own = Path(f"/proc/self/fd/{file.fileno()}")
    return own if own.exists() else path


def _remove_unused(path: Path) -> bool:
    """Removes a file unless a process holds it; whether it is gone."""
    try:
        with _open_to_lock(path) as file:
            free = flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if free is None:
                free = time.time() - os.fstat(file.fileno()).st_mtime > IN_USE_S
            if free:
                path.unlink()
            return free
    except (PermissionError, ValueError):
        return False
    except FileNotFoundError:
        return True


def _open_to_lock(path: Path) -> BinaryIO:
    """NFS locks only what is open for writing; what others have written is not ours to open so."""
    try:
        return _open(path, "r+b")
    except PermissionError:
        return _open(path, "rb")


def check(path: Path, shard: Shard) -> None:
    """Holds a copy of a shard against the manifest.

    Raises:
        ValueError: it is not the shard.
    """
    with open(path, "rb") as file:
        size, digest = path.stat().st_size, _digest(file)
    if (size, digest) != (shard.bytes, shard.sha256):
        raise ValueError(
            f"got {size} bytes with sha256 {digest[:12]}…, the manifest says "
            f"{shard.bytes} and {shard.sha256[:12]}…: the shard is damaged or of another data "
            "set; upload it again"
        )
