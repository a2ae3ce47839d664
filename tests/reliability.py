"""Tries faults and attacks on real runs, by the hundred, and writes the tables of
docs/reliability.md; and attacks through every reader, whose table is in docs/security.md.

    python tests/reliability.py trials=100
    python tests/reliability.py trials=300 minutes=15      goes on where the last one stopped
    python tests/reliability.py trials=0                   the tables of what was tried so far
    python tests/reliability.py trials=0 attacks=true      each attack as often as it is to be tried
    python tests/reliability.py trials=0 attacks=true fault=twice minutes=15
    … again=true                                           what was tried with another commit, too
    python tests/reliability.py intrusions=100 cases=10000 through readers, so often; the fuzzer

Every trial is a line of the results file; one that failed names what was wrong, and its run stays
where it was. The last line of the output is a summary in JSON.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from crysforge.trainer.base.command_line import parse  # noqa: E402
from crysforge.trainer.base.script import run  # noqa: E402
from tests import security  # noqa: E402
from tests.attacks import ATTACKS  # noqa: E402
from tests.distributed.conftest import write_data  # noqa: E402
from tests.distributed.faults import Server  # noqa: E402
from tests.distributed.trials import KINDS, Bench  # noqa: E402

BEGIN, END = "<!-- table: python tests/reliability.py -->\n", "<!-- end of table -->\n"
KEY = ("attack", "number", "fault", "seed")
"""What tells results apart."""
ATTACKED = "<!-- table: python tests/reliability.py attacks=true -->\n"


@dataclass(kw_only=True)
class Config:
    """What to try."""

    trials: int = 100
    """How many faults in all, those of earlier calls included."""
    attacks: bool = False
    """Whether to try the attacks (tests/attacks.py) that earlier calls have not."""
    first: int = 0
    """Number of the first fault to try: several calls at a time share the work and the results
    file."""
    again: bool = False
    """Whether to try anew what was tried with another commit."""
    minutes: float = 1e9
    """Starts no more trials after so many minutes."""
    fault: str = ""
    """Only kinds whose name contains this."""
    folder: str = ""
    """Keeps the data and the undisturbed runs for later calls, as long as the code is the same."""
    results: str = str(ROOT / "docs" / "reliability.jsonl")
    """One line per trial; grows."""
    attack_results: str = str(ROOT / "docs" / "attacks.jsonl")
    """The same for attacks."""
    page: str | None = str(ROOT / "docs" / "reliability.md")
    """Where the tables are; empty leaves them."""
    intrusions: int = 0
    """Instead of trials: how often to mount each attack of tests/intrusions.py."""
    cases: int = 0
    """Instead of trials: cases of tests/fuzz.py."""


def read(path: Path) -> list[dict[str, Any]]:
    """The trials so far; of one that was tried again, the last."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({tuple(t.get(key) for key in KEY): t for t in lines}.values())


@functools.cache
def commit() -> str:
    """The code that is tried."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def known(config: Config, tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What need not be tried."""
    return [t for t in tried if not config.again or t.get("commit") == commit()]


def of_which_code(tried: list[dict[str, Any]]) -> str:
    """A sentence on the commits that were tried."""
    named = sum("commit" in t for t in tried)
    return f"\n{named} of these {len(tried)} name their commit; the others are of earlier ones.\n"


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
    return "\n".join(lines) + "\n" + of_which_code(trials)


def attack_table(tried: list[dict[str, Any]]) -> str:
    """Markdown, one row per attack that was tried."""
    lines = ["| attack | tried | held |", "|---|---:|---:|"]
    for attack in ATTACKS:
        own = [t for t in tried if t["attack"] == attack.name]
        if own:
            lines.append(f"| {attack.name} | {len(own)} | {sum(t['held'] for t in own)} |")
    return "\n".join(lines) + "\n" + of_which_code(tried)


def insert(page: str, text: str, begin: str = BEGIN) -> str:
    """The page with another table."""
    before, _, rest = page.partition(begin)
    return before + begin + text + END + rest.partition(END)[2]


def note(path: Path, result: dict[str, Any]) -> None:
    """Adds a line to a results file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({**result, "commit": commit()}) + "\n")


def try_faults(config: Config, bench: Bench, done: list[dict[str, Any]], end: float) -> None:
    """Does the trials that are not done yet, and adds them."""
    kinds = [k for k in KINDS if config.fault in k.name]
    seeds = {t["seed"] for t in known(config, done)}
    todo = [s for s in range(config.first, config.trials) if s not in seeds]
    for seed in (s for s in todo if KINDS[s % len(KINDS)] in kinds):
        if time.monotonic() > end:
            break
        kind, began = KINDS[seed % len(KINDS)], time.monotonic()
        weights = [1 / job.size**2 for job in kind.jobs]  # those on two ranks take long
        (job,) = random.Random(seed).choices(kind.jobs, weights)
        trial = bench.trial(kind, job, seed)
        note(Path(config.results), trial)
        verdict = "recovered" if trial["recovered"] else trial["problem"]
        print(
            f"{seed} {kind.name} ({job.name}): {verdict}, {trial['lost']} steps lost, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )


def try_attacks(config: Config, bench: Bench, done: list[dict[str, Any]], end: float) -> None:
    """Does the attacks that are not done yet, and adds them."""
    before = {(t["attack"], t["number"]) for t in known(config, done)}
    todo = [(a, n) for a in ATTACKS if config.fault in a.name for n in range(a.times)]
    for attack, number in todo:
        if (attack.name, number) in before:
            continue
        if time.monotonic() > end:
            break
        folder, began = bench.folder / f"{attack.do.__name__}-{number}", time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        result: dict[str, Any] = {"attack": attack.name, "number": number, "held": True}
        try:
            attack.do(number, bench, folder)
            shutil.rmtree(folder)
        except AssertionError as error:
            result |= {"held": False, "problem": str(error)[-2000:]}
        note(Path(config.attack_results), result)
        verdict = result.get("problem", "held")
        print(f"{number} {attack.name}: {verdict}, {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    config = parse(Config, __doc__)
    if config.intrusions or config.cases:
        problems = security.go_on(config.intrusions, config.cases, config.minutes)
        print(json.dumps({"intrusions": security.read(), "failed": len(problems)}))
        raise SystemExit(1 if problems else 0)
    names = [row.name for row in (*KINDS, *ATTACKS)]
    if not any(config.fault in name for name in names):
        raise ValueError(f"no fault is called {config.fault!r}: {'; '.join(names)}")
    done, attacked = read(Path(config.results)), read(Path(config.attack_results))
    end = time.monotonic() + 60 * config.minutes
    if config.attacks or config.again or len(done) < config.trials:
        folder = Path(config.folder or tempfile.mkdtemp(prefix="reliability-"))
        data = folder / "prototypes"
        if not data.is_dir():
            write_data(data)
        with Server() as server:
            bench = Bench(server, data, folder)
            try_faults(config, bench, done, end)
            if config.attacks:
                try_attacks(config, bench, attacked, end)
    done, attacked = read(Path(config.results)), read(Path(config.attack_results))
    text, more = table(done), attack_table(attacked)
    if config.page:
        page = Path(config.page)
        whole = insert(page.read_text(encoding="utf-8"), text)
        page.write_text(insert(whole, more, ATTACKED), encoding="utf-8")
    print(text, more, sep="\n")
    failed = [t["seed"] for t in done if not t["recovered"] or t["exact"] is False]
    broken = [[t["attack"], t["number"]] for t in attacked if not t["held"]]
    counts = {"trials": len(done), "failed": failed, "attacks": len(attacked), "broken": broken}
    print(json.dumps(counts))


if __name__ == "__main__":
    run(main)
