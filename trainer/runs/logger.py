"""Where numbers go: TensorBoard, metrics.jsonl, a progress bar and a heartbeat from rank 0; events
from every rank."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crysforge.datapipe.common.escape import printable, tag
from crysforge.datapipe.common.files import make_directory, open_append, write_json, write_text
from crysforge.datapipe.common.safe_read import read_lines
from crysforge.trainer.base.distributed import World
from crysforge.trainer.runs.board import Board
from crysforge.trainer.runs.forms import LOGGED

BEAT_S = 5.0
"""Least time between two heartbeats, in seconds."""


class Logger:
    """Logs one stage of a run. Ranks other than 0 log events only.

    Logging errors (a full disk) are reported once and never stop training.

    TensorBoard sees a curve per stage in RUN/tensorboard/<stage>; a resumed stage purges what the
    killed process logged after its last checkpoint, so the curve stays one.
    """

    def __init__(self, run: Path, stage: str, start: int, total: int, world: World) -> None:
        self.run, self.stage, self.total, self.world = run, stage, total, world
        self.enabled = world.main
        self.board_path = run / "tensorboard" / stage
        self._beaten = -BEAT_S
        self._lock = threading.Lock()  # the thread that writes checkpoints has events too
        self._troubled = False
        self.bar = tqdm(
            total=total,
            initial=start,
            desc=stage,
            unit="step",
            disable=not self.enabled,
            mininterval=1.0,
            dynamic_ncols=True,
        )
        events = run / "events"
        make_directory(events, parents=False)  # the run may have been deleted
        self._events = open_append(events / f"rank-{world.rank:04d}.jsonl")
        if self.enabled:
            _drop_lines(run / "metrics.jsonl", stage, start)
            self._lines = open_append(run / "metrics.jsonl")
            again = self.board_path.is_dir()
            with self._not_worth_a_run():
                for folder in (self.board_path.parent, self.board_path):
                    make_directory(folder, parents=False)
            self._board = Board(self.board_path, start + 1 if again else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records named scalars (`train/loss`, `val/mae`, …) at an optimiser step."""
        if not self.enabled:
            return
        with self._not_worth_a_run():
            self._lines.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
            self._lines.flush()
        with self._not_worth_a_run():
            self._board.scalars(step, {tag(name): value for name, value in values.items()})

    @contextmanager
    def _not_worth_a_run(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._troubled:
                self._troubled = True
                self.print(f"warning: logs are not complete: {error}", every_rank=True)

    def event(self, kind: str, **values: Any) -> None:
        """Appends a line to this rank's RUN/events/rank-<rank>.jsonl: `time` in seconds since
        1970, `event`, `stage`, `rank` and the values (JSON)."""
        line = {"time": round(time.time(), 3), "event": kind, "stage": self.stage}
        line |= {"rank": self.world.rank, **values}
        with self._lock, self._not_worth_a_run():
            self._events.write(json.dumps(line) + "\n")
            self._events.flush()

    def heartbeat(self, step: int, status: str = "running") -> None:
        """Shows that rank 0 is alive, in RUN/heartbeat.json; every few seconds at most, unless the
        status changes from `running`."""
        now = time.monotonic()
        if not self.enabled or (status == "running" and now - self._beaten < BEAT_S):
            return
        self._beaten = now
        beat = {"time": round(time.time(), 3), "status": status, "stage": self.stage}
        beat |= {"step": step, "total": self.total, "rank": self.world.rank}
        beat |= {"ranks": self.world.size, "host": socket.gethostname(), "pid": os.getpid()}
        with self._not_worth_a_run():
            write_json(self.run / "heartbeat.json", beat, durable=False)

    def advance(self, **shown: str) -> None:
        """One optimiser step further on the progress bar."""
        with suppress(OSError):
            self.bar.update(1)
            if shown:
                self.bar.set_postfix(shown, refresh=False)

    def print(self, text: str, every_rank: bool = False) -> None:
        """A line for people, above the progress bar; from rank 0 unless asked of every rank."""
        if self.enabled or every_rank:
            with suppress(OSError):
                tqdm.write(printable(text))

    def warning(self, text: str, **values: Any) -> None:
        """A warning that all ranks have: a line for people and an event."""
        self.event("warning", message=text, **values)
        self.print(f"warning: {text}")

    def close(self) -> None:
        """Flushes everything."""
        self.bar.close()
        with self._not_worth_a_run():
            self._events.close()
        if self.enabled:
            with self._not_worth_a_run():
                self._lines.close()
            with self._not_worth_a_run():
                self._board.close()


def _drop_lines(path: Path, stage: str, start: int) -> None:
    """Forgets lines of this stage that were logged after the step a run resumes from."""
    if not path.is_file():
        return
    kept = [
        f"{text}\n"
        for text, line in read_lines(path, LOGGED)
        if line["stage"] != stage or line["step"] <= start
    ]
    write_text(path, "".join(kept))


def read_metrics(run: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    """The curves of a stage from RUN/metrics.jsonl: name → [(step, value), …]."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for _, line in read_lines(run / "metrics.jsonl", LOGGED):
        if line.pop("stage") == stage:
            step = line.pop("step")
            for name, value in line.items():
                curves.setdefault(name, []).append((step, value))
    return curves
