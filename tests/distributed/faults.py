"""Runs launch scripts that are killed, starved or fed NaNs at a chosen moment, and reports.

A server process imports torch and DeepSpeed once and forks every rank of every run, so that a run
costs what it computes. A fault is armed in the forked rank alone, by wrapping a function of the
product: `{"at": "trainer.engine:TorchEngine.step", "call": 3, "do": "kill"}` acts when the third
call begins (`"when": "after"`: ends). The product knows nothing of it.
"""

from __future__ import annotations

import atexit
import dataclasses
import errno
import functools
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.distributed.ranks import ROOT, free_port, rank_environ
from trainer.signals import REQUEUE

KILLED = -signal.SIGKILL


class Server:
    """Use as a context manager, then `run`."""

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.faults"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(
        self,
        script: str,
        *args: str,
        ranks: int | None = None,
        faults: dict[int, dict[str, Any]] | None = None,
        ids: Path | None = None,
        timeout: float = 240,
    ) -> tuple[list[int], str]:
        """Exit codes of the ranks (negative: the signal that ended it) and what they printed.

        When a rank fails, the others are killed after a while, as launchers do.

        Args:
            script: of launch/.
            ranks: None sets no launcher's variables.
            faults: rank → what befalls it.
            ids: directory for the crystals of every training step that a rank takes.
        """
        port = free_port()
        order = {
            "script": script,
            "args": list(args),
            "environs": [{}] if ranks is None else [
                {k: v for k, v in rank_environ(r, ranks, port).items() if os.environ.get(k) != v}
                for r in range(ranks)
            ],
            "faults": {str(k): v for k, v in (faults or {}).items()},
            "ids": str(ids) if ids else None,
            "timeout": timeout,
        }  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["codes"], answer["output"]


def serve() -> None:
    """Answers orders from standard input until it closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in ("deepspeed", "torch.utils.tensorboard", "launch.pretrain", "launch.finetune"):
        importlib.import_module(module)
    folder = Path(tempfile.mkdtemp())  # not a context: its end would come in every child too
    for line in sys.stdin:
        order = json.loads(line)
        files = [folder / f"rank-{r}" for r in range(len(order["environs"]))]
        children = [_fork(order, rank, file) for rank, file in enumerate(files)]
        codes = _wait(children, order["timeout"])
        output = "".join(file.read_text(errors="replace") for file in files)
        answers.write(json.dumps({"codes": codes, "output": output}) + "\n")
        answers.flush()
    shutil.rmtree(folder)


def _wait(children: list[int], timeout: float, grace: float = 15) -> list[int]:
    """Exit codes; kills what is left some seconds after the first failure, or at the timeout."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child] not in (0, REQUEUE):
                        end = min(end, time.monotonic() + grace)
                elif time.monotonic() > end:
                    os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _fork(order: dict[str, Any], rank: int, output: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()  # with its loader workers
        with open(output, "wb") as file, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(order["environs"][rank])
        if fault := order["faults"].get(str(rank)):
            _arm(**fault)
        if order["ids"]:
            _note_ids(Path(order["ids"]), rank)
        sys.argv = [f"launch/{order['script']}.py", *order["args"]]
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _arm(at: str, do: str, call: int = 1, when: str = "before", calls: int = 1) -> None:
    """Wraps a function so that something happens at its `call`th call and the `calls` - 1 after."""
    owner, names = importlib.import_module(at.partition(":")[0]), at.partition(":")[2].split(".")
    for name in names[:-1]:
        owner = getattr(owner, name)
    original, count = getattr(owner, names[-1]), 0

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        now = call <= count < call + calls
        if now and when == "before":
            _act(do)
        result = original(*args, **kwargs)
        if now and do == "nan":
            return {k: dataclasses.replace(t, total=t.total * torch.nan) for k, t in result.items()}
        if now and when == "after":
            _act(do)
        return result

    setattr(owner, names[-1], wrapped)


def _act(do: str) -> None:
    if do.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, do))
    elif do.startswith("group "):  # as Slurm and launchers do: loader workers too
        os.killpg(0, getattr(signal, do.removeprefix("group ")))
    elif do == "disk full":
        raise OSError(errno.ENOSPC, "No space left on device")
    elif do == "hang":
        threading.Event().wait()


def _note_ids(folder: Path, rank: int) -> None:
    """Appends (position, ids) of every training batch that this process takes."""
    from datapipe.stream import Stream

    original = Stream._joined

    def joined(self: Any, group: Any) -> Any:
        batch = original(self, group)
        if self.train:
            with open(folder / f"{time.time_ns():020d}-{os.getpid()}-{rank}.json", "w") as file:
                json.dump({"position": self.position, "ids": batch.ids * (not batch.filler)}, file)
        return batch

    Stream._joined = joined  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
