"""Commands do the same on a file system that has no file locks, and say so once."""

from __future__ import annotations

import signal

from crysforge.datapipe.storage.manifest import Manifest
from tests import no_locks
from tests.launching import FINETUNE
from tests.no_locks import left_in, run

PREPARE = ["launch/prepare.py", "input=prototypes", "size=200", "targets=[density]", "workers=2"]
SAID = "has no file locks"
KILLED = """
import os, runpy, signal, sys
from crysforge.datapipe.storage.writer import DatasetWriter
add = DatasetWriter.add
def killed(self, *args, **more):
    add(self, *args, **more)
    if len(self) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
DatasetWriter.add = killed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_prepare_that_was_killed(tmp_path):
    """Its lock names a process that is no more; the same command goes on at once."""
    environ = no_locks.environ(tmp_path / "shim", "ENOSYS")
    data = tmp_path / "data"
    killed = run(environ, "-c", KILLED, *PREPARE, f"output={data}")
    assert killed.returncode == -signal.SIGKILL
    assert ".data.partial/lock.owner" in left_in(tmp_path)
    done = run(environ, *PREPARE, f"output={data}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(SAID) == 1
    assert sum(Manifest.load(data).splits.values()) == 200
    assert left_in(tmp_path) == []


def test_finetuning_with_a_cache(tmp_path, data):
    environ = no_locks.environ(tmp_path / "shim", "ENOSYS")
    done = run(
        environ, "launch/finetune.py", *FINETUNE, f"data={data}", f"run_dir={tmp_path / 'run'}",
        "init_from=none", "target=density", "finetune.max_steps=2", "loader.workers=1",
        f"loader.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(SAID) == 1
    assert list((tmp_path / "cache").glob("*.tar"))
    assert left_in(tmp_path) == ["cache/lock"]
