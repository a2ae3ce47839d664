"""What happened to a run, as JSON lines: one file for its job, and one for each of its processes.

EVENTS/<run>.jsonl             attempts: start, how it ended, requeue
EVENTS/<run>/rank-0000.jsonl   start and end of a process: node, exit code
"""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from crysforge.datapipe.common.checked import Count, Line, Name, Seconds, between, matching
from crysforge.datapipe.common.files import make_directory, open_append
from crysforge.datapipe.common.safe_read import read_lines

JobId = Annotated[str, matching(r"\d{1,18}(_\d{1,18})?|debug", "the id of a job")]
EVENT = {
    "event": Name,
    "time": Seconds,
    "job?": JobId,
    "attempt?": Count,
    "rank?": Count,
    "node?": Line,
    "pid?": Count,
    "code?": Annotated[int, between(-255, 255)],
    "progress?": Line,
    "ends?": Seconds | None,
    "no_progress?": bool,
    "reason?": Line,
}
"""A line of the file of a run's job."""
PROCESS = {**EVENT, "job": JobId, "attempt": Count, "rank": Count, "node": Line}
"""A line of the file of one of its processes."""
REQUEUE = 75
"""Exit code of a job that stopped before its end and can be continued (trainer/base/signals.py)."""

USER_ERROR = 2
"""Exit code of a job that a person has to mend (trainer/base/command_line.py)."""


def outcome_of(code: int) -> str:
    """How a process with this exit code (negative: signal) ended: `finished`; `stopped`: asked to,
    and can be continued; `failed`: someone has to mend something; `crashed`: anything else, perhaps
    only since another process went away."""
    if code == 0:
        return "finished"
    if code == REQUEUE or -code in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        return "stopped"  # a signal perhaps before the script could listen
    return "failed" if code == USER_ERROR else "crashed"


class EventLog:
    """Events of a run's job, or of one of its processes, one JSON object a line."""

    def __init__(self, folder: str | Path, run: str, rank: int | None = None) -> None:
        events = Path(folder) / "events"
        self.path = events / f"{run}.jsonl"
        if rank is not None:
            self.path = events / run / f"rank-{rank:04d}.jsonl"

    def note(self, event: str, **values: Any) -> None:
        """Appends an event with the time (seconds since 1970)."""
        make_directory(self.path.parent)
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        with open_append(self.path) as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All events, oldest first; lines that a kill cut off are left out."""
        return [event for _, event in read_lines(self.path, EVENT)]

    def starts(self, job: str) -> list[dict[str, Any]]:
        """The attempts of a job so far."""
        return [e for e in self.read() if e["event"] == "start" and e.get("job") == job]

    def without_progress(self, job: str) -> int:
        """Number of most recent attempts that hit the time limit without a new checkpoint."""
        ends = [e for e in reversed(self.read()) if "code" in e and e.get("job") == job]
        return sum(1 for _ in itertools.takewhile(lambda e: e.get("no_progress"), ends))

    def crashes(self, progress: str) -> int:
        """Consecutive crashes since the last progress."""
        count = 0
        for event in reversed(self.read()):
            if event["event"] in ("stopped", "finished"):
                break
            if event["event"] == "start":
                if event.get("progress") != progress:
                    break
                count += 1
        return count


def ends_of_attempt(folder: str | Path, run: str, job: str, attempt: int) -> list[dict[str, Any]]:
    """How the processes of a job ended in an attempt, those that have said so, in order of time."""
    ends = []
    for path in (Path(folder) / "events" / run).glob("rank-*.jsonl"):
        events = [event for _, event in read_lines(path, PROCESS)]
        ends += [e for e in events if (e["job"], e["attempt"]) == (job, attempt) and "code" in e]
    return sorted(ends, key=lambda e: e["time"])


def verdict(ends: Sequence[dict[str, Any]], code: int) -> dict[str, Any]:
    """The event that sums up the ends of a job's processes: `event`, `rank`, `node`, `code`.

    Rank 0 finishes when all is done. A process that knows what is wrong outweighs those that only
    lost it, and an orderly stop what happens on the way out of it; else the first crash counts.

    Args:
        code: exit code of the whole step.
    """
    if any(e["rank"] == 0 and e["event"] == "finished" for e in ends):
        return {"event": "finished", "code": 0}
    for outcome in ("failed", "stopped", "crashed"):
        for end in ends:
            if end["event"] == outcome:
                return {key: end[key] for key in ("event", "rank", "node", "code")}
    return {"event": "crashed", "code": code or 1}
