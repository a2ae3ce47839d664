"""Where the bytes of a data set come from: a local path, or any URL, copied whole with retries.

| root | read by |
|---|---|
| `/a/path`, `file:///a/path` | opening it |
| `http(s)://…`, `s3://…`, `gs://…` and whatever else fsspec knows | fsspec |
| `pipe:COMMAND` | running COMMAND, which prints the file; no shell: `pipe:sh -c '…'` for one |

The name of a file is put in place of `{}` in a URL or command, or at its end after a slash.
A remote file is complete and checked before anything of it is used.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import Callback

from crysforge.datapipe.common.files import DISK_FULL
from crysforge.datapipe.storage.command import check_length, run_command

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the second try, doubled from try to try, and the most; up to half is random."""

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_PLAIN = re.compile(r"[A-Za-z0-9._=+,-]+")
"""A part of a path that means nothing else in any URL."""
MAX_BYTES = 1 << 40
"""Bytes of the longest file there may be."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How files of a data set are reached."""

    tries: int = 5
    """Attempts at a remote file."""
    timeout_s: float = 300.0
    """Seconds after which an attempt is given up."""
    cache_dir: str | None = None
    """Directory for copies of shards; see `datapipe.storage.cache`."""
    cache_gb: float = 20.0
    """Size that the copies are kept below."""


DEFAULT = Access()


def local_path(url: str | os.PathLike) -> str | None:
    """The path that a URL stands for; None if the file is elsewhere."""
    text = os.fspath(url)
    if text.startswith("file:"):
        return text.removeprefix("file:").removeprefix("//")
    return None if text.startswith("pipe:") or "://" in text else text


def is_remote(url: str | os.PathLike) -> bool:
    """Whether a URL or command stands for files elsewhere."""
    return local_path(url) is None


def is_below(url: str, root: str) -> bool:
    """Whether a URL is that of `root` or leads to something below it, and nowhere else."""
    if not is_remote(url) or not is_remote(root) or root.startswith("pipe:"):
        return False
    rest = url.removeprefix(root.rstrip("/"))
    parts = rest.split("/")
    plain = all(_PLAIN.fullmatch(part) and part.strip(".") for part in parts[1:] if part)
    return rest != url and parts[0] == "" and plain


def join_path(root: str | os.PathLike, name: str) -> str:
    """Path or URL of file `name` of the data set at `root`."""
    text = os.fspath(root)
    if local_path(text) is None and "{}" in text:
        return text.replace("{}", name)
    return f"{text.rstrip('/')}/{name}"


def open_file(
    root: str | os.PathLike,
    name: str,
    access: Access = DEFAULT,
    check: Callable[[Path], None] | None = None,
    most: int = MAX_BYTES,
) -> BinaryIO:
    """File `name` of the data set at `root`, opened for reading bytes; a remote one is copied to
    the temporary directory, and the copy is deleted when it is closed.

    Args:
        check: raises ValueError if a copy is not what it should be.
        most: bytes of the longest copy; no more are taken, whatever is sent.

    Raises:
        OSError: missing, or not readable; after all tries.
        ValueError: the protocol is unknown, or its package is not installed.
    """
    url = join_path(root, name)
    path = local_path(url)
    if path is not None:
        return open_local(path)
    with tempfile.TemporaryDirectory(prefix="crysforge-") as folder:
        copy = Path(folder) / name
        download(url, copy, access, check, most)
        return open(copy, "rb")


def open_local(path: str) -> BinaryIO:
    """A file opened for reading. Raises OSError if it is missing, a link out of its directory, or a
    pipe or device, which might never end."""
    if os.path.islink(path):
        folder = os.path.realpath(os.path.dirname(path) or ".")
        if not os.path.realpath(path).startswith(f"{folder}{os.sep}"):
            raise OSError(errno.EINVAL, "a link out of its directory is not followed", path)
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  (it is what we return)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "no regular file", path)
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_file(
    root: str | os.PathLike,
    name: str,
    access: Access = DEFAULT,
    check: Callable[[Path], None] | None = None,
    most: int = MAX_BYTES,
) -> bytes:
    """What is in file `name` of the data set at `root`; see `open_file`.

    Raises:
        ValueError: it is longer than `most`, wherever it is.
    """
    with open_file(root, name, access, check, most) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{join_path(root, name)} is longer than the {most} bytes it may have")
    return data


def download(
    url: str,
    path: Path,
    access: Access,
    check: Callable[[Path], None] | None = None,
    most: int = MAX_BYTES,
) -> None:
    """Copies what is at a URL to `path`, again and again until it is there and passes the check.
    Of what is longer than `most` bytes, no more is taken.

    Raises:
        OSError: missing (FileNotFoundError), refused, or all tries failed; it says which URL.
        ValueError: the protocol is unknown, or its package is not installed.
    """
    copy = _copier(url, access.timeout_s, most)
    for tried in range(1, access.tries + 1):
        try:
            copy(path)
            if check is not None:
                check(path)
            return
        except (FileNotFoundError, NotADirectoryError):
            raise
        except Exception as error:  # every protocol has its own
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if _is_refusal(error) or tried == access.tries:
                tries = f" (try {tried} of {access.tries})" if tried > 1 else ""
                raise OSError(f"cannot read {url}{tries}: {reason}") from error
        wait = min(FIRST_WAIT * 2 ** (tried - 1), LONGEST_WAIT)
        wait *= random.SystemRandom().uniform(0.5, 1.0)  # leaves the global RNG state alone
        log.warning("cannot read %s (%s), trying again in %.1f s", url, reason, wait)
        time.sleep(wait)


def _copier(url: str, timeout_s: float, most: int) -> Callable[[Path], Any]:
    """A function that copies what is at the URL to a path."""
    local = local_path(url)
    if local is not None:
        return lambda path: _copy_file(local, path, most)
    if url.startswith("pipe:"):
        command = shlex.split(url.removeprefix("pipe:"))
        if not command or shutil.which(command[0]) is None:
            raise ValueError(f"cannot read {url}: there is no such command")
        return lambda path: run_command(command, path, timeout_s, most)
    protocol = url.split("://")[0]
    options = _no_limit_of_its_own() if protocol in ("http", "https") else {}
    try:
        system, remote = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        remedy = f"it needs the package {package}: pip install {package}" if package else error
        raise ValueError(f"cannot read {url}: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"cannot read {url}: {error}") from None
    limit = {"timeout": timeout_s} if isinstance(system, AsyncFileSystem) else {}
    return lambda path: system.get_file(remote, str(path), callback=_Counting(most), **limit)


class _Counting(Callback):
    """Ends a copy that is announced to be, or becomes, longer than it may."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        check_length(max(self.value, self.size or 0), self._most)


def _copy_file(source: str, path: Path, most: int) -> None:
    done = 0
    with open_local(source) as stream, open(path, "wb") as output:
        while block := stream.read(1 << 20):
            done += len(block)
            check_length(done, most)
            output.write(block)


def _no_limit_of_its_own() -> dict[str, Any]:
    from aiohttp import ClientTimeout

    return {"client_kwargs": {"timeout": ClientTimeout(total=None)}}


def _is_refusal(error: Exception) -> bool:
    """Whether the server would refuse another try as well."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, PermissionError)
