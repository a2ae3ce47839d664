"""Files and directories that are whole or absent, whoever else writes and whatever lies in the way.

What is written gets a name beside its place that nobody can have prepared, and takes its place in
one rename. Only files are replaced: a link, a pipe or a device in the place is an error.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from crysforge.datapipe.common.places import is_stream, open_stream
from crysforge.datapipe.common.safe_read import parse_json
from crysforge.datapipe.common.temporary import filling, name_beside, new_file

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers."""

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike, mode: str = "w", *, durable: bool = True, streams: bool = False
) -> Iterator[IO[Any]]:
    """A file that takes its place when the block ends without an error; else nothing happens.

    Args:
        mode: `w` for text in UTF-8 (line ends as they are written) or `wb`.
        durable: waits until it is on disk.
        streams: where the place is a pipe, a terminal or another character device (`/dev/stdout`),
            writes to it as the block goes on.

    Raises:
        OSError: the place is a link, or anything else but a file; the disk is full.
    """
    path = Path(path)
    options: Any = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if streams and is_stream(path):
        with open(open_stream(path), mode, **options) as file:
            yield file
        return
    with _naming(path):
        _refuse_unless_file(path)
        temporary, guard = new_file(path)
        try:
            with open(os.dup(guard), mode, **options) as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(guard)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(guard)
        if durable:
            sync_directory(path.parent)


@contextlib.contextmanager
def replacing_by_name(path: Path) -> Iterator[Path]:
    """The same for libraries that want the name of a file to write. They get a directory of their
    own, so that what they leave beside the file goes too."""
    _refuse_unless_file(path)
    with _naming(path), filling(path, "tmp") as work:
        temporary = work / path.name
        yield temporary
        file = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(file, work.stat().st_mode & 0o666)  # by the umask
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
        remove_tree(work)
        sync_directory(path.parent)


def write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Replaces the file's content in one step; see `replacing`."""
    with replacing(path, "wb", durable=durable) as file:
        file.write(data)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Replaces the file's content in one step; see `replacing`."""
    write_bytes(path, text.encode(), durable)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Replaces the file by readable JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n", durable)


def read_json_lines(path: Path, last: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file that has one a line, each with its line; what is none, as a line
    that a kill has cut off, is left out. Of a long file only the `last` bytes, if that is asked."""
    with open(path, "rb") as file:
        if last is not None:
            file.seek(max(0, os.fstat(file.fileno()).st_size - last))
        content = file.read()
    for line in content.decode("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            value = parse_json(line, str(path))
            if isinstance(value, dict):
                yield line, value


def open_append(path: Path) -> IO[str]:
    """A text file to add lines to.

    Raises:
        OSError: it is a link, a pipe, a device.
    """
    _refuse_unless_file(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8")


def make_directory(path: Path, parents: bool = True) -> None:
    """Makes a directory unless it is there.

    Args:
        parents: whether those above it are made, too, and not missed.

    Raises:
        OSError: a link or a file is there; the directory above is not.
    """
    try:
        path.mkdir(parents=parents)
    except FileExistsError:
        if path.is_symlink():
            _refuse_unless_file(path)
        if not path.is_dir():
            raise


@contextlib.contextmanager
def new_directory(path: str | os.PathLike, again: bool = False) -> Iterator[Path]:
    """A directory that appears when the block ends: it is filled under another name beside, and of
    a block that fails nothing stays.

    Args:
        again: whether one is well that is there and holds just what the block makes, as the same
            command does that was killed when its work was done.

    Raises:
        ValueError: `path` exists.
        OSError: it has appeared since.
    """
    path = Path(path)
    there = path.exists() or path.is_symlink()
    if there and not (again and path.is_dir() and not path.is_symlink()):
        raise ValueError(f"{path} exists: choose another output")
    with filling(path, "partial") as work:
        yield work
        if there:
            if not _same(work, path):
                raise ValueError(f"{path} exists: choose another output")
            remove_tree(work)
            return
        _sync_tree(work)
        work.rename(path)
        sync_directory(path.parent)


@contextlib.contextmanager
def replacing_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A directory that takes its place when the block ends; what was there goes then. Where a link
    leads, if the place is one."""
    path = Path(path).resolve()
    with filling(path, "partial") as work:
        yield work
        _sync_tree(work)
        old = name_beside(path, "old")
        if path.exists():
            os.rename(path, old)
        os.rename(work, path)
        sync_directory(path.parent)
        remove_tree(old)


def remove_tree(path: Path) -> None:
    """Deletes a directory, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Waits until names in a directory (a rename) are on disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_space(path: Path, size: int) -> None:
    """Raises OSError unless `size` bytes and a little more fit on the disk of `path`."""
    free = shutil.disk_usage(path).free
    if free < 1.05 * size + 2**24:
        raise OSError(
            errno.ENOSPC, f"{size / 1e9:.3g} GB to write, {free / 1e9:.3g} GB free", str(path)
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of the lines "<sha256>  <name>" of its files."""
    if not path.is_dir():
        with open(path, "rb") as stream:
            return hash_of(stream)[0]
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{sha256(file)}  {file.relative_to(path).as_posix()}\n".encode())
    return digest.hexdigest()


def hash_of(stream: IO[bytes]) -> tuple[str, int]:
    """SHA-256 of what is left to read of a file, and how many bytes that was."""
    digest, size = hashlib.sha256(), 0
    while block := stream.read(1 << 20):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def _same(made: Path, there: Path) -> bool:
    """Whether two directories hold the same; of the second, which may be any, only the names are
    looked at where these differ."""
    names = {p.relative_to(made): p.is_dir() for p in made.rglob("*")}
    found = set()
    for path in there.rglob("*"):
        name = path.relative_to(there)
        if path.is_symlink() or names.get(name) != path.is_dir():
            return False
        found.add(name)
    return found == names.keys() and sha256(made) == sha256(there)


def _refuse_unless_file(path: Path) -> None:
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    if kind in _KINDS:
        raise OSError(
            f"{path} is {_KINDS[kind]} and is not replaced: remove it, or give another path"
        )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A write that fails for want of space does not say where."""
    try:
        yield
    except OSError as error:
        if error.errno in (*DISK_FULL, errno.EFBIG) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_tree(path: Path) -> None:
    """Waits until all that is in a directory is on disk."""
    for folder, _, names in os.walk(path):
        for file in (Path(folder, name) for name in names):
            if file.is_file() and not file.is_symlink():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        sync_directory(Path(folder))
