"""Commands on a file system that says that it has no file locks."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.distributed.ranks import ROOT

ANSWERS = ["ENOSYS", "EBADF", "ENOLCK", "EOPNOTSUPP"]
"""What Lustre says without its option, NFS to who may only read, NFS without its daemon, others."""

_C = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <unistd.h>

int flock(int file, int operation) {
    int answer = atoi(getenv("NO_LOCKS"));
    int reads = (fcntl(file, F_GETFL) & O_ACCMODE) == O_RDONLY;
    if (answer == EBADF && !(reads && operation & LOCK_EX))
        return syscall(SYS_flock, file, operation);
    errno = answer;
    return -1;
}
"""
_PYTHON = """
import errno, fcntl, os

def flock(file, operation, flock=fcntl.flock, answer=int(os.environ["NO_LOCKS"])):
    number = file if isinstance(file, int) else file.fileno()
    reads = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    if answer == errno.EBADF and not (reads and operation & fcntl.LOCK_EX):
        return flock(file, operation)
    raise OSError(answer, os.strerror(answer))

fcntl.flock = flock
"""


def environ(folder: Path, answer: str) -> dict[str, str]:
    """What makes every process, where there is a C compiler, else every Python, see such a file
    system; `folder` is for what that takes."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found["NO_LOCKS"] = str(getattr(errno, answer))
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "no_locks.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler:
        if not library.exists():
            (folder / "no_locks.c").write_text(_C)
            command = [compiler, "-shared", "-fPIC", "-o", library, folder / "no_locks.c"]
            subprocess.run(command, check=True)
        return {**found, "LD_PRELOAD": str(library)}
    (folder / "sitecustomize.py").write_text(_PYTHON)
    return {**found, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def run(environ: dict[str, str], *args: str | Path) -> subprocess.CompletedProcess:
    """Runs `python ARGS`, and returns what came of it."""
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, env=environ, capture_output=True, text=True
    )


def left_in(folder: Path) -> list[str]:
    """Locks and temporaries below a folder."""
    names = [str(p.relative_to(folder)) for p in folder.rglob("*")]
    marks = (".owner", ".tmp", ".partial", "lock")
    return [name for name in names if name.endswith(marks)]
