"""What is done to commands from outside, beside the faults of tests/distributed/trials.py: parents
that are killed, commands that are given twice, file systems without locks.

An attack raises AssertionError where a promise of docs/reliability.md is broken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.datapipe.storage.dataset import DatasetWriter
from crysforge.datapipe.storage.manifest import Manifest
from tests import no_locks
from tests.distributed.trials import ALONE, FINETUNING, SAVE_EVERY, Bench, differences
from tests.families import orphans
from tests.launch.cluster.test_submit_local import supervised
from tests.launching import FINETUNE, PRETRAIN
from tests.no_locks import ANSWERS, left_in
from tests.waits import FUNCTIONS, WAITS, loader_orphans, worker_orphans

VAE = replace(
    ALONE, name="vae", args=[*ALONE.args, "stages=[vae]", "vae.max_steps=6"], steps=6
)  # fmt: skip


def kill_training(number: int, bench: Bench, folder: Path) -> None:
    """Its two loader workers wait in one of seven ways."""
    wait = WAITS[number % len(WAITS)]
    with DatasetWriter(folder / "data", [], shard_size=10) as writer:
        for _, crystal in zip(range(60), prototypes(size=200, seed=0), strict=False):
            writer.add("train", crystal)
        writer.finish({})
    work = folder / "work"
    work.mkdir()
    left = loader_orphans(wait, folder / "data", work)
    assert not left, f"{wait.__name__}: {left}"


def kill_preparing(number: int, bench: Bench, folder: Path) -> None:
    """Its workers do one of four things."""
    function = FUNCTIONS[number % len(FUNCTIONS)]
    left = worker_orphans(function)
    assert not left, f"{function.__name__}: {left}"


def kill_submit(number: int, bench: Bench, folder: Path) -> None:
    """`submit cluster=local`, the controller of a cell, or what started its script."""
    with supervised(folder) as process:
        line = [process]
        while children := line[-1].children():
            line.append(children[0])
        assert len(line) == 4, line
        left = orphans(line[number % 3])
        assert not left, left


def start_twice(number: int, bench: Bench, folder: Path) -> None:
    """The same command, at the same time: the later of the two has the run, the earlier ends with
    one line, and the run is what one of them alone had made of it."""
    job, run = (VAE, FINETUNING)[number % 2], folder / "run"
    ended = bench.server.run(
        job.script, *job.args, f"trainer.checkpoint_every={SAVE_EVERY}", f"data={bench.data}",
        f"run_dir={run}", times=2,
    )  # fmt: skip
    assert sorted(ended.codes) == [0, 2], (ended.codes, ended.output[-3000:])
    owner = json.loads((run / "owner.json").read_text(encoding="utf-8"))
    assert f"was started again, by process {owner['pid']} on" in ended.output, ended.output[-3000:]
    assert ended.output.count("error: ") == 1 and "Traceback" not in ended.output, ended.output
    other = differences(run, bench.whole(job))
    assert not other, other
    assert not left_in(run), left_in(run)


def take_locks_away(number: int, bench: Bench, folder: Path) -> None:
    """From prepare, pretrain with a cache, finetune, and predict by `submit cluster=local`."""
    environ = no_locks.environ(folder / "shim", ANSWERS[number % len(ANSWERS)])
    data, predictions = folder / "data", folder / "predictions.csv"
    alone = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    prepare = ["launch/prepare.py", "input=prototypes", "size=200", "targets=[density]"]
    cache = ["loader.workers=1", f"loader.cache_dir={folder / 'cache'}"]
    for command in (
        [*prepare, f"output={data}"],
        ["launch/pretrain.py", *PRETRAIN, *cache, f"data={data}", f"run_dir={folder / 'pre'}"],
        ["launch/finetune.py", *FINETUNE, *cache, f"data={data}", f"run_dir={folder / 'fine'}",
         f"init_from={folder / 'pre'}", "target=density"],
        ["launch/submit.py", "cluster=local", "job=predict", f"checkpoint={folder / 'fine'}",
         f"input={data}", f"output={predictions}"],
    ):  # fmt: skip
        done = no_locks.run(environ, *command)
        assert done.returncode == 0, (command, done.stderr[-3000:])
        assert done.stderr.count("has no file locks") <= 1, done.stderr
    assert len(predictions.read_text(encoding="utf-8").splitlines()) == 201
    done = no_locks.run({**alone, "PYTHONPATH": environ["PYTHONPATH"]}, *prepare,
                        f"output={folder / 'other'}")  # fmt: skip
    assert Manifest.load(data) == Manifest.load(folder / "other"), done.stderr
    names = [n for n in left_in(folder) if n != "cache/lock" and "/code-1/" not in n]
    assert not names, names


@dataclass(frozen=True)
class Attack:
    """A row of the table."""

    name: str
    do: Callable[[int, Bench, Path], None]
    """Takes a number that says which way it is done, the tools and an empty folder."""
    times: int
    """How often it is tried."""


ATTACKS = [
    Attack("SIGKILL of a training: loader workers left", kill_training, 70),
    Attack("SIGKILL of prepare: workers left", kill_preparing, 40),
    Attack("SIGKILL of `submit cluster=local` or below: processes left", kill_submit, 30),
    Attack("the same command twice at once", start_twice, 200),
    Attack("no file locks (ENOSYS, EBADF, ENOLCK, EOPNOTSUPP)", take_locks_away, 8),
]
