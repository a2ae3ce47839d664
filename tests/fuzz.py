"""Random damage and malice, through every reader: whatever a file holds, it is read as data or
refused with one line.

    python tests/fuzz.py cases=10000
    python tests/fuzz.py cases=500 only=manifests first=300       some readers, some cases again

Each case copies a sound sample, changes one to three places of it (values, fields, bytes, whole
files), makes the hashes right again as an attacker would, and reads it as users do. It fails if
something runs, if anything outside is touched or sent (`tests/guarded.py`), if an error is not one
line, or if it takes long. The last line of the output is a summary in JSON.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from crysforge.trainer.base.command_line import parse  # noqa: E402
from crysforge.trainer.base.script import run  # noqa: E402
from crysforge.trainer.base.tensors import code_version  # noqa: E402
from tests.guarded import Breach, Guard  # noqa: E402
from tests.intrusions import ATTACKS, Scene, mount  # noqa: E402
from tests.malice import Malice, agree  # noqa: E402
from tests.samples import READERS, Reader  # noqa: E402


def case(reader: Reader, guard: Guard, seed: int) -> str:
    """One case: what was wrong, or nothing."""
    for left in guard.box.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    (guard.box / "tmp").mkdir()
    scene = Scene(guard, random.Random(f"{reader.name} {seed}"))
    root, malice = scene.place("sample"), Malice(scene)
    reader.make(root, scene)
    for _ in range(scene.dice.choice([1, 1, 1, 2, 3])):
        files = sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
        if files:
            malice.damage(scene.dice.choice(files), reader.replaced)
    if scene.dice.random() < 0.7:
        agree(root)
    try:
        with guard.armed():
            reader.read(root, scene)
    except (ValueError, OSError) as error:
        if "\n" in str(error):
            return f"an error of several lines: {str(error)!r}"[:300]
    except Breach as breach:
        return f"breach: {breach}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"[:400]
    return ""


def prepared() -> Guard:
    """A watched process: without programs to find, its temporary files in the box."""
    code_version()
    importlib.import_module("matplotlib.font_manager")  # makes directories of its own
    sys.dont_write_bytecode = True  # encoders are imported when they are asked for
    logging.disable(logging.WARNING)
    guard = Guard(Path(tempfile.mkdtemp(prefix="crysforge-fuzz-")))
    os.environ["PATH"] = ""
    tempfile.tempdir = str(guard.box / "tmp")
    os.chdir(guard.box)
    return guard


def fuzz(
    guard: Guard, cases: int, first: int = 0, only: str = ""
) -> Iterator[tuple[Reader, int, str]]:
    """Cases over all readers in turn: each with its number, and what was wrong."""
    turns = [r for r in READERS for _ in range(r.weight)]
    for number in range(first, first + cases):
        reader = turns[number % len(turns)]
        if only in reader.name:
            yield reader, number, case(reader, guard, number)


def attacked(times: int, first: int = 0) -> list[str]:
    """Mounts every attack of tests/intrusions.py so often; what got through."""
    guard, problems = prepared(), []
    for attack in ATTACKS:
        for number in range(first, first + times):
            if problem := mount(attack, guard, number):
                problems.append(f"{attack.name} {number}: {problem}")
    clean(guard)
    return problems


def clean(guard: Guard) -> None:
    """Removes what a watched process was given."""
    os.chdir("/")
    shutil.rmtree(guard.folder)


@dataclass(kw_only=True)
class Config:
    """What to try."""

    cases: int = 1000
    """How many in all."""
    first: int = 0
    """Number of the first."""
    only: str = ""
    """Only readers whose name contains this."""
    attacks: int = 0
    """How often to mount each attack of tests/intrusions.py besides."""


def main() -> None:
    config = parse(Config, __doc__)
    guard = prepared()
    tried: dict[str, int] = {}
    problems = []
    for reader, number, problem in fuzz(guard, config.cases, config.first, config.only):
        tried[reader.name] = tried.get(reader.name, 0) + 1
        if problem:
            problems.append(f"{reader.name} {number}: {problem}")
            print(problems[-1], flush=True)
    clean(guard)
    problems += attacked(config.attacks) if config.attacks else []
    print(json.dumps({"cases": sum(tried.values()), "tried": tried, "failed": len(problems)}))
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
