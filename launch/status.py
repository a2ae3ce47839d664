"""How cells stand, from what is on disk and what Slurm still knows; results as one CSV."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import end_local
from launch.events import EventLog
from launch.submission import (
    SUFFIX,
    Submission,
    replace_text,
    run_finished,
    slurm_states,
)
from launch.task import cancelled

_OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
"""States in which a Slurm job will do no more."""


@dataclass
class CellStatus:
    """One row of the table."""

    cell: str
    state: str
    """finished, running, pending, cancelled, failed, …"""
    step: str = ""
    """Newest logged step, with its stage."""
    value: str = ""
    """MAE on the test or validation split, or the loss."""
    node: str = ""
    retries: str = ""
    """Turns after the first."""
    reason: str = ""
    """Last line of the log of a cell that failed."""

    @property
    def active(self) -> bool:
        """Whether a job of the cell waits or runs."""
        return self.state not in ("finished", "not started", "unfinished") and not self.ended

    @property
    def ended(self) -> bool:
        """Whether the cell ended without being finished."""
        return self.state in _ENDED


_ENDED = {s.lower().replace("_", " ") for s in _OVER} | {"stopped", "lost", "crashed"}


def statuses(path: str | Path) -> list[CellStatus]:
    """Status of all cells of a submission, or of the run directories at or under a path.

    Raises:
        ValueError: there is neither.
    """
    submission = Submission.find(path)
    if submission is not None:
        return of_submission(submission)
    runs = run_directories(Path(path))
    if not runs:
        raise ValueError(f"{path} is neither a submission's output or folder, nor holds runs")
    return [
        CellStatus(name, "finished" if run_finished(run) else "unfinished", *last_logged(run))
        for name, run in runs.items()
    ]


def of_submission(submission: Submission) -> list[CellStatus]:
    """Status of each cell of a submission."""
    ids = [i for cluster, i in map(submission.job_id, submission.cells) if cluster == "slurm"]
    known = slurm_states(ids)
    return [_of_cell(submission, cell, known) for cell in submission.cells]


def _of_cell(
    submission: Submission, cell: str, known: Mapping[str, tuple[str, str]] | None
) -> CellStatus:
    events = EventLog(submission.folder, cell).read()
    starts = [e for e in events if e["event"] == "start"]
    cluster, id = submission.job_id(cell)
    slurm_state, node = (known or {}).get(id, ("", "")) if cluster == "slurm" else ("", "")
    status = CellStatus(cell, "", *last_logged(submission.output(cell)))
    status.node = node or (starts[-1]["node"] if starts else "")
    status.retries = str(max(0, len(starts) - 1)) if starts else ""
    status.state = _state(submission, cell, slurm_state, known is not None)
    if status.state in ("failed", "crashed"):
        status.reason = _last_words(submission, id)
    return status


def _state(submission: Submission, cell: str, slurm_state: str, reachable: bool) -> str:
    """One word for where a cell stands."""
    if submission.finished(cell):
        return "finished"
    if slurm_state and slurm_state not in _OVER:
        return slurm_state.lower()
    cluster, id = submission.job_id(cell)
    events = [e for e in EventLog(submission.folder, cell).read() if e.get("job") == id or not id]
    last = events[-1]["event"] if events else ""
    if cluster == "local" and last in ("start", "requeue"):
        return "running" if alive(int(id), submission.folder) else "lost"
    if last == "stopped" and slurm_state in ("", "COMPLETED"):
        return "cancelled" if cancelled(submission.folder) else "stopped"
    if cancelled(submission.folder) and last not in ("failed", "crashed"):
        return "cancelled"
    if last in ("failed", "crashed", "gave up"):
        return "failed" if last == "gave up" else last
    if slurm_state:
        return "unfinished" if slurm_state == "COMPLETED" else slurm_state.lower().replace("_", " ")
    if cluster == "slurm":
        return "lost" if reachable else "unknown"
    return "lost" if events else "not started"


def alive(pid: int, folder: Path) -> bool:
    """Whether a local job's controller runs."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return str(folder / "logs").encode() in command
    return False


def run_directories(path: Path) -> dict[str, Path]:
    """Runs at a path, in it or one level further down, by name."""
    if (path / "run.json").is_file():
        return {path.name: path}
    found = [*path.glob("*/run.json"), *path.glob("*/*/run.json")]
    return {
        str(p.parent.relative_to(path)): p.parent
        for p in sorted(found)
        if not any(part.endswith(SUFFIX) for part in p.parts)
    }


def last_logged(run: Path) -> tuple[str, str]:
    """(step, value) of a run: a finished finetuning's test MAE, else the newest validation MAE or
    loss in metrics.jsonl."""
    stage, step, value = "", "", ""
    for line in _tail(run / "metrics.jsonl"):
        if line.get("stage") != stage:
            stage, value = line.get("stage", ""), ""
        step = f"{stage} {line.get('step', '')}"
        for key, number in line.items():
            if key == "train/loss" and not value.startswith("val"):
                value = f"loss {number:.4g}"
            elif key == "val/loss" and "MAE" not in value:
                value = f"val loss {number:.4g}"
            elif key.startswith("val/mae"):
                value = f"val MAE {number:.4g}"
                break
    metrics = _json(run / "metrics.json")
    for split in ("test", "val"):
        one = metrics.get(split, {})
        if isinstance(one, dict) and "mae" in one:
            unit = " ".join(metrics.get("units", {}).values())
            return step, f"{split} MAE {one['mae']:.4g} {unit}".strip()
    return step, value


def table(rows: Sequence[CellStatus]) -> str:
    """The status of all cells as text, with the reasons of failures below."""
    head = ("cell", "state", "step", "loss/MAE", "node", "retries")
    cells = [head, *((r.cell, r.state, r.step, r.value, r.node, r.retries) for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.state] = counts.get(row.state, 0) + 1
    lines.append(", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    lines += [f"{r.cell}: {r.reason}" for r in rows if r.reason]
    return "\n".join(lines)


def collect(path: str | Path) -> tuple[Path, int, int]:
    """Gathers every cell's metrics.json into PATH/results.csv, one row a cell whether it finished
    or not; returns the file, its rows, and how many of them have results.

    Raises:
        ValueError: there is neither a submission nor a run.
    """
    submission = Submission.find(path)
    rows: list[dict[str, Any]] = []
    done = 0
    for status in statuses(path):
        if submission is not None:
            run = submission.output(status.cell)
            values = submission.cells[status.cell]["values"]
        else:
            run, values = run_directories(Path(path))[status.cell], {}
        metrics = _json(run / "metrics.json")
        done += bool(metrics)
        row = {"cell": status.cell, "state": status.state, **dict(_flat(values))}
        rows.append({**row, **{k: v for k, v in _flat(metrics) if k not in row}})
    if not Path(path).is_dir():
        raise ValueError(f"nothing to collect yet: {path} does not exist")
    output = Path(path) / "results.csv"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    temporary = output.with_name(f".{output.name}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, output)
    return output, len(rows), done


def cancel(path: str | Path) -> int:
    """Ends all cells of a submission that wait or run; returns how many.

    Raises:
        ValueError: there is no submission, or Slurm refuses.
    """
    submission = Submission.find(path)
    if submission is None:
        raise ValueError(f"{path} was not submitted: there is no {Submission.folder_of(path)}")
    replace_text(submission.folder / "cancelled", "")
    rows = [r for r in of_submission(submission) if r.state != "finished"]
    known = slurm_states(i for a in submission.attempts for i in a["ids"].values()) or {}
    ended = 0
    for row in rows:
        cluster, id = submission.job_id(row.cell)
        if cluster == "local":
            ended += end_local(int(id), submission.folder)
    ids = sorted(
        id
        for attempt in submission.attempts
        if attempt["cluster"] == "slurm"
        for id in attempt["ids"].values()
        if known.get(id, ("COMPLETED",))[0] not in _OVER
    )
    if ids:
        done = subprocess.run(["scancel", *ids], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"scancel: {done.stderr.strip()}")
    return ended + len(ids)


def _last_words(submission: Submission, id: str) -> str:
    """The line of a job's newest log that names its error, or else the last one."""
    lines: list[str] = []
    for path in sorted((submission.folder / "logs").glob(f"{id}_*_log.out")):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            text = file.read().decode("utf-8", errors="replace")
        lines += [x.strip() for x in text.replace("\r", "\n").splitlines() if x.strip()]
    named = [x for x in lines if x.startswith("error: ")]
    return (named or lines or [f"no output in {submission.folder / 'logs'}"])[-1]


def _tail(path: Path, size: int = 65536) -> Iterator[dict[str, Any]]:
    """The last lines of a JSONL file, as many as fit the size."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        for line in file.read().decode("utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted columns; lists as words."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", " ".join(map(str, item)) if isinstance(item, list) else item
