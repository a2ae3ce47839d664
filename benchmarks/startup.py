"""Start-up: processor time until a command shows its help or refuses a typo, and until a model is
loaded.

    python benchmarks/startup.py                       all commands; a minute
    … model=RUN repeats=5                              a finetuned model of yours

Each command runs in processes of its own, `repeats` times after one that does not count, and the
least processor time counts. The exit code is 1 where one takes more than its target. The last line
is the table as JSON.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import show
from crysforge.launch.cli import commands
from crysforge.trainer.base.command_line import parse
from crysforge.trainer.base.script import run

ROOT = Path(__file__).resolve().parents[1]
FROM_STAGES = ("pretrain", "finetune")
"""Commands whose settings come from the stages, so that they import PyTorch first."""


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    model: str = str(ROOT / "tests/data/schema-2/model")
    """Model that is loaded."""
    repeats: int = 3
    """Runs of each command that count."""
    help_s: float = 1.5
    """Target of help and errors, in seconds of processor time."""
    torch_s: float = 4.0
    """The same of what imports PyTorch."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


def cases(config: BenchmarkConfig) -> list[tuple[str, list[str], int, float]]:
    """(name, arguments of Python, exit code, target in seconds) of what is measured."""
    found = [("crysforge --help", ["launch/cli.py", "--help"], 0, config.help_s)]
    for name in commands():
        target = config.torch_s if name in FROM_STAGES else config.help_s
        found.append((f"{name} --help", [f"launch/{name}.py", "--help"], 0, target))
        found.append((f"{name} with a typo", [f"launch/{name}.py", "tpyo=1"], 2, target))
    load = f"from crysforge import load; load({config.model!r})"
    found.append(("import crysforge", ["-c", "import crysforge"], 0, config.help_s))
    found.append(("load of a model", ["-c", load], 0, config.torch_s))
    found.append(("import torch", ["-c", "import torch"], 0, config.torch_s))
    return found


def seconds(arguments: list[str], code: int, repeats: int) -> float:
    """Least processor time of a process.

    Raises:
        ValueError: it ended with another exit code.
    """
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    least = float("inf")
    for number in range(1 + repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != code:
            raise ValueError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
        if number:
            took = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            least = min(least, took)
    return least


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    rows = []
    for name, arguments, code, target in cases(config):
        took = seconds(arguments, code, config.repeats)
        rows.append({"command": name, "CPU s": round(took, 2), "target": target})
    show(rows, {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)})
    late = [str(row["command"]) for row in rows if row["CPU s"] > row["target"]]
    if late:
        raise SystemExit(f"over target: {', '.join(late)}")


if __name__ == "__main__":
    run(main)
