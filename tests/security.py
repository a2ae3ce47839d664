"""Attacks through every reader and the fuzzer, as `python tests/reliability.py intrusions=100
cases=10000` runs them, and the table of docs/security.md."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from crysforge.datapipe.common.files import write_json
from tests.fuzz import clean, fuzz, prepared
from tests.guarded import Guard
from tests.intrusions import ATTACKS, mount
from tests.samples import READERS

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "security.md", ROOT / "docs" / "security.json"
BEGIN = "<!-- table: python tests/reliability.py intrusions=100 cases=10000 -->\n"
END = "<!-- end of table -->\n"
AT_RANDOM = "at random: "
SAVED = 50
"""Attacks after which the results are written."""
Tried = dict[str, list[int]]
"""By attack: how often it was tried, and how often it held."""


def names() -> list[str]:
    """All that can be tried, in the order of the table."""
    return [*(a.name for a in ATTACKS), *(f"{AT_RANDOM}{r.name}" for r in READERS)]


def read() -> Tried:
    """What was tried so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def table(tried: Tried) -> str:
    """Markdown, a row for each attack that was tried."""
    lines = ["| attack | times | held |", "|---|---:|---:|"]
    lines += [f"| {n} | {tried[n][0]} | {tried[n][1]} |" for n in names() if n in tried]
    return "\n".join(lines) + "\n"


def insert(page: str, text: str) -> str:
    """The page with another table."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + text + END + rest.partition(END)[2]


def write(tried: Tried) -> None:
    """Keeps what was tried, and puts it into the page."""
    write_json(RESULTS, tried)
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), table(tried)), encoding="utf-8")


def todo(guard: Guard, tried: Tried, times: int, cases: int) -> Iterator[tuple[str, int, str]]:
    """Mounts what was not tried yet: the attack, its number, and what was wrong."""
    for attack in ATTACKS:
        for number in range(tried.get(attack.name, [0])[0], times):
            yield attack.name, number, mount(attack, guard, number)
    done = sum(counts[0] for name, counts in tried.items() if name.startswith(AT_RANDOM))
    for reader, number, problem in fuzz(guard, max(0, cases - done), done):
        yield f"{AT_RANDOM}{reader.name}", number, problem


def go_on(times: int, cases: int, minutes: float = 1e9) -> list[str]:
    """Mounts every attack until it was tried so often, and so many random cases in all; what
    earlier calls have done counts. The page and the results grow meanwhile.

    Returns:
        What got through.
    """
    guard, tried, problems = prepared(), read(), []
    end = time.monotonic() + 60 * minutes
    for count, (name, number, problem) in enumerate(todo(guard, tried, times, cases), 1):
        counts = tried.setdefault(name, [0, 0])
        counts[0] += 1
        counts[1] += not problem
        if problem:
            problems.append(f"{name} {number}: {problem}")
            print(problems[-1], flush=True)
        if count % SAVED == 0:
            write(tried)
        if time.monotonic() > end:
            break
    clean(guard)
    write(tried)
    print(table(tried))
    return problems
