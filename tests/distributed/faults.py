"""Runs launch scripts that are killed, starved or fed NaNs at a chosen moment, and reports.

A server process imports torch and DeepSpeed once and forks every rank of every run, so that a run
costs what it computes. A fault is armed in the forked rank alone, by wrapping a function of the
product: `{"at": "crysforge.trainer.engines.torch_engine:TorchEngine.step", "call": 3, "do":
"SIGKILL"}` acts when the third call begins (`"when": "after"`: ends). The product knows nothing of
it.

What `do` may be: the name of a signal; `group` and a signal, for the rank and its loader workers;
`workers` and a signal, for the workers alone; `hang`; `hang with the lock`, which lets no other
thread of the process run either; `remove` and a path, which is moved away; `delete` and a path;
`disk full`, while the function runs no byte can be written to any file; `nan`, in what a stage
returns; `fail` and a reason, which is raised as a ValueError; `answer` and JSON, which is returned.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
import torch

from crysforge.datapipe.common import threads
from crysforge.trainer.base.signals import REQUEUE
from tests.distributed.ranks import CHOOSE, ROOT, free_port, rank_environ
from tests.families import left_of, session_of

KILLED = -signal.SIGKILL
REACHED = "fault: "
"""What a rank prints when its fault acts."""
NOTE = "took: "
"""What a rank prints of each training batch."""


class Ended(NamedTuple):
    """What came of one start of a job."""

    codes: list[int]
    """Exit codes of the ranks; negative: the signal that ended it."""
    output: str
    """What they printed."""
    taken: list[Taken]
    """The training batches that they took, each rank's in order."""
    left: list[str]
    """Processes of theirs that were left behind."""


class Taken(NamedTuple):
    """One rank's part of a training step."""

    rank: int
    position: int
    """Of the stream, behind the step."""
    ids: list[str]


class Server:
    """Use as a context manager, then `run`."""

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{CHOOSE}; from {__name__} import serve; serve()"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
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
        own: dict[int, list[str]] | None = None,
        environ: dict[int, dict[str, str]] | None = None,
        timeout: float = 240,
        times: int = 1,
    ) -> Ended:
        """Starts a job and waits for its end. When a rank fails, the others are killed after a
        while, as launchers do.

        Args:
            script: of launch/.
            ranks: None sets no launcher's variables.
            faults: rank → what befalls it.
            times: how often the command is given at the same time, where it has no ranks.
            own: rank → what only its command says.
            environ: rank → what only its environment says.
        """
        port = free_port()
        order = {
            "script": script,
            "args": [[*args, *(own or {}).get(r, ())] for r in range(ranks or times)],
            "environs": [{}] * times if ranks is None else [
                {k: v for k, v in rank_environ(r, ranks, port).items() if os.environ.get(k) != v}
                | (environ or {}).get(r, {})
                for r in range(ranks)
            ],
            "faults": {str(k): v for k, v in (faults or {}).items()},
            "timeout": timeout,
            "grace": timeout if times > 1 else 15,
        }  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return ended(answer["codes"], answer["output"], answer["left"])


def ended(codes: list[int], output: str, left: list[str]) -> Ended:
    """What came of a start, from what it printed."""
    noted = re.compile(rf"\n{NOTE}(.*)\n")
    taken = [Taken(*json.loads(text)) for text in noted.findall(output)]
    return Ended(codes, noted.sub("", output), taken, left)


def serve() -> None:
    """Answers orders from standard input until it closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in (
        "deepspeed",
        "torch.utils.tensorboard",
        "crysforge.launch.pretrain",
        "crysforge.launch.finetune",
    ):
        importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        children = [_fork(order, rank) for rank in range(len(order["environs"]))]
        codes, output, left = _wait(children, order["timeout"], order["grace"])
        answers.write(json.dumps({"codes": codes, "output": output, "left": left}) + "\n")
        answers.flush()


def _wait(
    children: list[tuple[int, int]], timeout: float, grace: float
) -> tuple[list[int], str, list[str]]:
    """Exit codes, output, and what ranks leave behind, which is killed; kills ranks that are left
    some seconds after the first failure, or at the timeout.

    Args:
        children: process and the pipe it prints to, of every rank.
    """
    codes: dict[int, int] = {}
    printed: dict[int, bytes] = {child: b"" for child, _ in children}
    end = time.monotonic() + timeout
    while len(codes) < len(children):
        for child, pipe in children:
            with contextlib.suppress(BlockingIOError):
                while block := os.read(pipe, 1 << 16):
                    printed[child] += block
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child] not in (0, REQUEUE):
                        end = min(end, time.monotonic() + grace)
                elif time.monotonic() > end:
                    os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    sessions = {child for child, _ in children}
    behind = left_of([p for p in psutil.process_iter() if session_of(p) in sessions])
    for _, pipe in children:
        with contextlib.suppress(BlockingIOError):
            while block := os.read(pipe, 1 << 16):
                printed[child] += block
        os.close(pipe)
    output = "".join(text.decode(errors="replace") for text in printed.values())
    return [codes[child] for child, _ in children], output, [str(p) for p in behind]


def _fork(order: dict[str, Any], rank: int) -> tuple[int, int]:
    """The process of a rank, and the pipe it prints to."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        os.set_blocking(reading, False)
        return child, reading
    code = 1
    try:
        os.setsid()  # with its loader workers
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.environ.update(order["environs"][rank])
        threads._choice = None  # the server's
        torch.set_num_threads(threads.share_of(os.environ).threads)
        run_rank(order, rank)
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


def run_rank(order: dict[str, Any], rank: int) -> None:
    """Runs the script of an order in this process, as one of its ranks."""
    if fault := order["faults"].get(str(rank)):
        _arm(**fault)
    _note_batches(rank)
    sys.argv = [f"launch/{order['script']}.py", *order["args"][rank]]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


def owner_of(at: str) -> tuple[Any, str]:
    """What holds a function, and its name there."""
    module, _, path = at.partition(":")
    owner, names = importlib.import_module(module), path.split(".")
    for name in names[:-1]:
        owner = getattr(owner, name)
    return owner, names[-1]


def _arm(
    at: str, do: str, call: int = 1, when: str = "before", calls: int = 1, within: str = ""
) -> None:
    """Wraps a function so that something happens at its `call`th call and the `calls` - 1 after;
    `within` another function, only the calls below that one count."""
    owner, name = owner_of(at)
    original, count, inside = getattr(owner, name), 0, not within

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += inside
        now = inside and call <= count < call + calls
        if now:
            print(f"{REACHED}{do}", flush=True)
        if now and do == "disk full":
            with _no_space():
                return original(*args, **kwargs)
        if now and do.startswith("answer "):
            return json.loads(do.removeprefix("answer "))
        if now and when == "before":
            _act(do)
        result = original(*args, **kwargs)
        if now and do == "nan":
            return {k: dataclasses.replace(t, total=t.total * torch.nan) for k, t in result.items()}
        if now and when == "after":
            _act(do)
        return result

    setattr(owner, name, wrapped)
    if within:
        outer, outer_name = owner_of(within)
        around = getattr(outer, outer_name)

        @functools.wraps(around)
        def entered(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside = True
            try:
                return around(*args, **kwargs)
            finally:
                inside = False

        setattr(outer, outer_name, entered)


@contextlib.contextmanager
def _no_space() -> Iterator[None]:
    """Every write to a file fails in the kernel: none may grow beyond nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _act(do: str) -> None:
    words = do.split(" ", 1)
    if do.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, do))
    elif words[0] == "group":  # as Slurm and launchers do
        os.killpg(0, getattr(signal, words[1]))
    elif words[0] == "workers":
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, getattr(signal, words[1]))
    elif do == "hang":
        threading.Event().wait()
    elif do == "hang with the lock":
        ctypes.PyDLL(None).pause()
    elif words[0] == "remove":
        os.replace(words[1], words[1] + ".away")
    elif words[0] == "delete":
        shutil.rmtree(words[1], ignore_errors=True)
    elif words[0] == "fail":
        raise ValueError(words[1])


def _note_batches(rank: int) -> None:
    """Prints what training batches this process takes."""
    from crysforge.datapipe.loading.stream import Stream

    original = Stream._joined

    def joined(self: Any, group: Any) -> Any:
        batch = original(self, group)
        if self.train:
            note = json.dumps([rank, self.position, batch.ids * (not batch.is_dummy)])
            os.write(1, f"\n{NOTE}{note}\n".encode())
        return batch

    Stream._joined = joined  # type: ignore[method-assign]
