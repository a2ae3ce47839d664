"""Training beside other work: the README's commands on a machine that also runs busy loops.

    python benchmarks/busy.py                   makes synthetic crystals; about ten minutes
    … data=DIR loops=4 repeats=3                a data set of yours; more loops
    … before=false                              without the rows of torch's own threads

The debug model is trained in one process and by `deepspeed --num_gpus 2`, idle and beside `loops`
processes that do nothing but compute, in turn, `repeats` times; the medians count. `torch` is what
torch does where nobody chooses: a thread for every CPU, and waiting threads that spin; processor
time tells even where the machine is not idle. The exit code is 1 where `chosen` takes more than
`most` times as long beside the loops. The last line is the table as JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import show
from crysforge.datapipe.common import threads
from crysforge.trainer.base.command_line import parse
from crysforge.trainer.base.script import run
from crysforge.trainer.runs.logger import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/pretrain/tiny.yaml"
COMMANDS = {
    "one process": [sys.executable],
    "two ranks": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"],
}
EVERY, SKIPPED = 5, 2
"""Steps between two lines of the log, and lines of a stage that do not count."""


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory; empty: 500 synthetic crystals."""
    loops: int = 2
    """Busy loops."""
    steps: int = 30
    """Of each of the two stages."""
    repeats: int = 3
    """Runs of each command."""
    before: bool = True
    """Whether torch's own threads are shown, too."""
    most: float = 2.5
    """Largest ratio of busy to idle that is well."""

    def __post_init__(self) -> None:
        if self.steps < EVERY * (SKIPPED + 1):
            raise ValueError(f"steps={self.steps}: {EVERY * (SKIPPED + 1)} or more are needed")


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    ways = {"chosen": {}, "torch": torchs_own()} if config.before else {"chosen": {}}
    kinds = list(itertools.product(COMMANDS, ways, (0, config.loops)))
    found: dict[tuple, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="crysforge-") as folder:
        data = config.data or crystals(Path(folder) / "data")
        for repeat, (number, kind) in itertools.product(range(config.repeats), enumerate(kinds)):
            command, way, loops = kind
            path = Path(folder) / f"{number}-{repeat}"
            with busy(loops):
                found[kind].append(train(config, COMMANDS[command], ways[way], data, path))
    rows = []
    for command, way in itertools.product(COMMANDS, ways):
        idle, loaded = (
            [statistics.median(values) for values in zip(*found[command, way, n], strict=True)]
            for n in (0, config.loops)
        )
        rows.append(
            {
                "command": command,
                "threads": way,
                "idle_s": idle[0],
                "busy_s": loaded[0],
                "ratio": loaded[0] / idle[0],
                "idle_cpu_s": idle[1],
                "busy_cpu_s": loaded[1],
                "idle_step_ms": idle[2],
                "busy_step_ms": loaded[2],
            }
        )
    show(rows, {"cpus": os.cpu_count(), "loops": config.loops, "steps": config.steps})
    if max(row["ratio"] for row in rows if row["threads"] == "chosen") > config.most:
        raise SystemExit(1)


def torchs_own() -> dict[str, str]:
    """Variables that make torch compute and wait as it does without any."""
    return {threads.COUNT: str(os.cpu_count()), "GOMP_SPINCOUNT": "300000"}


def crystals(path: Path) -> str:
    """A small data set."""
    call(
        [sys.executable, "launch/prepare.py", "input=prototypes", "size=500", f"output={path}",
         "targets=[density]"],
        {},
    )  # fmt: skip
    return str(path)


def train(
    config: BenchmarkConfig, start: list[str], settings: dict[str, str], data: str, path: Path
) -> tuple[float, float, float]:
    """Seconds of a command on the clock and of all processors, and milliseconds of a step."""
    began, used = time.perf_counter(), processor_time()
    call(
        [*start, "launch/pretrain.py", "--config", CONFIG, f"data={data}", f"run_dir={path}",
         f"vae.max_steps={config.steps}", f"joint.max_steps={config.steps}",
         f"trainer.log_every={EVERY}"],
        settings,
    )  # fmt: skip
    seconds, used = time.perf_counter() - began, processor_time() - used
    rates = [
        statistics.median(v for _, v in read_metrics(path, stage)["speed/steps_per_s"][SKIPPED:])
        for stage in ("vae", "joint")
    ]
    return seconds, used, 1e3 * statistics.mean(1 / rate for rate in rates)


def processor_time() -> float:
    """Seconds that all processes that were started here and have ended took."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def call(command: list[str], settings: dict[str, str]) -> None:
    """Runs a command as a user does. Raises ValueError if it fails."""
    environ = threads.users(os.environ) | settings
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes that compute, until the end of the block or of this process."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**5))"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    run(main)
