"""Attacks get nowhere: each one there is, a few times, and the fuzzer (tests/fuzz.py) a little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMES = 6


def test_every_attack_is_held(tmp_path):
    """In a process of its own, as its audit hook stays for good."""
    code = f"from tests.fuzz import attacked; print(attacked({TIMES}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_three_hundred_cases_of_the_fuzzer():
    command = [sys.executable, "tests/fuzz.py", "cases=300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["cases"] == 300 and summary["failed"] == 0 and min(summary["tried"].values()) > 5


BREACHES = {
    "a command": "import os; os.system(guard.command)",
    "a program": "import subprocess; subprocess.Popen(guard.command.split())",
    "a connection": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "a pickle": "import pickle; pickle.loads(b'cos\\ngetpid\\n(tR.')",
    "a file written": "open(guard.outside / 'x', 'w')",
    "a link followed": "open(guard.box / 'link', 'w')",
    "a secret read": "open(guard.secret)",
    "a secret by a link": "open(guard.box / 'secret')",
    "a file removed": "(guard.outside / 'notes.tmp').unlink()",
    "a folder removed": "import shutil; shutil.rmtree(guard.outside / 'vae-00000001')",
    "a file moved": "(guard.box / 'a').rename(guard.outside / 'a')",
    "a fork": "import os; os.fork() or os._exit(0)",
    "a file written by a worker": "with Workers(write, 2) as w: list(w.map(range(2)))",
    "a pickle loaded by a worker": "with Workers(unpickle, 2) as w: list(w.map(range(2)))",
    "hidden by a handler": "try:\n  open(guard.secret)\nexcept Exception:\n  pass",
}


def test_the_guard_notices(tmp_path):
    """Each breach alone; and what it should allow."""
    code = f"""
import os
from pathlib import Path
from crysforge.datapipe.common.workers import Workers
from tests.guarded import Breach, Guard
def write(number):
    open(guard.outside / "x", "w")
def unpickle(number):
    import pickle
    pickle.loads(b'cos\\ngetpid\\n(tR.')
guard = Guard(Path({str(tmp_path)!r}))
(guard.box / "a").write_text("a")
(guard.box / "link").symlink_to(guard.outside / "new")
(guard.box / "secret").symlink_to(guard.secret)
for name, text in {BREACHES!r}.items():
    try:
        with guard.armed():
            exec(text)
    except Breach:
        continue
    except ChildProcessError:
        pass
    print("not noticed:", name)
with guard.armed():
    (guard.box / "a").rename(guard.box / "b")
    (guard.box / "c").mkdir()
    (guard.box / "c").rmdir()
    open("/etc/hosts").close()
    with Workers(Path, 2) as workers:
        assert list(workers.map(["a", "b"])) == [Path("a"), Path("b")]
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
