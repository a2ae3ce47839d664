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
    "in a worker": "list(Workers(open, 2).map([guard.secret]))",
    "hidden by a handler": "try:\n  open(guard.secret)\nexcept Exception:\n  pass",
}


def test_the_guard_notices(tmp_path):
    """Each breach alone; and what it should allow."""
    code = f"""
import os
from pathlib import Path
from crysforge.datapipe.common.workers import Workers
from tests.guarded import Breach, Guard
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
    print("not noticed:", name)
with guard.armed():
    (guard.box / "a").rename(guard.box / "b")
    (guard.box / "c").mkdir()
    (guard.box / "c").rmdir()
    open("/etc/hosts").close()
    with Workers(len, 2) as workers:
        assert list(workers.map([b"a", b"bc"], chunk=1)) == [1, 2]
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
