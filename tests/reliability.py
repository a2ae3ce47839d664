"""Tries faults on real runs, by the hundred, and writes the table of docs/reliability.md.

    python tests/reliability.py trials=100
    python tests/reliability.py trials=300 minutes=15      goes on where the last one stopped
    python tests/reliability.py trials=0                   the table of what was tried so far

Every trial is a line of the results file; one that failed names what was wrong, and its run stays
where it was. The last line of the output is a summary in JSON.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from crysforge.trainer.base.command_line import parse, run  # noqa: E402
from tests.distributed.conftest import write_data  # noqa: E402
from tests.distributed.faults import Server  # noqa: E402
from tests.distributed.trials import KINDS, Bench  # noqa: E402

BEGIN, END = "<!-- table: python tests/reliability.py -->\n", "<!-- end of table -->\n"


@dataclass(kw_only=True)
class Config:
    """What to try."""

    trials: int = 100
    """How many in all, those of earlier calls included."""
    first: int = 0
    """Number of the first to do: several calls at a time share the work and the results file."""
    minutes: float = 1e9
    """Starts no more trials after so many minutes."""
    fault: str = ""
    """Only kinds whose name contains this."""
    folder: str = ""
    """Keeps the data and the undisturbed runs for later calls, as long as the code is the same."""
    results: str = str(ROOT / "docs" / "reliability.jsonl")
    """One line per trial; grows."""
    page: str | None = str(ROOT / "docs" / "reliability.md")
    """Where the table is; empty leaves it."""


def read(path: Path) -> list[dict[str, Any]]:
    """The trials so far."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(trials: list[dict[str, Any]]) -> str:
    """Markdown, one row per kind of fault that was tried."""
    lines = [
        "| fault | tried | recovered | steps lost: median | max | bit-identical |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        own = [t for t in trials if t["fault"] == kind.name]
        if not own:
            continue
        lost = [t["lost"] for t in own if t["recovered"]] or [0]
        exact = sum(t["exact"] is True for t in own) if kind.exact else "–"
        lines.append(
            f"| {kind.name} | {len(own)} | {sum(t['recovered'] for t in own)} "
            f"| {statistics.median(lost):g} | {max(lost)} | {exact} |"
        )
    return "\n".join(lines) + "\n"


def insert(page: str, text: str) -> str:
    """The page with another table."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + text + END + rest.partition(END)[2]


def main() -> None:
    config = parse(Config, __doc__)
    kinds = [k for k in KINDS if config.fault in k.name]
    if not kinds:
        raise ValueError(f"no fault is called {config.fault!r}: {'; '.join(k.name for k in KINDS)}")
    path = Path(config.results)
    done = read(path)
    seeds = {t["seed"] for t in done}
    end = time.monotonic() + 60 * config.minutes
    todo = [s for s in range(config.first, config.trials) if s not in seeds]
    todo = [s for s in todo if KINDS[s % len(KINDS)] in kinds]
    if todo:
        folder = Path(config.folder or tempfile.mkdtemp(prefix="reliability-"))
        data = folder / "prototypes"
        if not data.is_dir():
            write_data(data)
        with Server() as server:
            bench = Bench(server, data, folder)
            for seed in todo:
                if time.monotonic() > end:
                    break
                kind, began = KINDS[seed % len(KINDS)], time.monotonic()
                weights = [1 / job.size**2 for job in kind.jobs]  # those on two ranks take long
                (job,) = random.Random(seed).choices(kind.jobs, weights)
                trial = bench.trial(kind, job, seed)
                done.append(trial)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(trial) + "\n")
                verdict = "recovered" if trial["recovered"] else trial["problem"]
                print(
                    f"{seed} {kind.name} ({job.name}): {verdict}, {trial['lost']} steps lost, "
                    f"{time.monotonic() - began:.0f} s",
                    flush=True,
                )
    text = table(done)
    if config.page:
        page = Path(config.page)
        page.write_text(insert(page.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(text)
    failed = [t["seed"] for t in done if not t["recovered"] or t["exact"] is False]
    print(json.dumps({"trials": len(done), "failed": failed}))


if __name__ == "__main__":
    run(main)
