"""How runs stand, from what is on disk and what Slurm still knows; results as one CSV."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.escape import one_line
from crysforge.datapipe.common.files import replacing, write_text
from crysforge.datapipe.common.places import own_file
from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.datapipe.common.tables import row_writer
from crysforge.launch.cluster.events import EventLog, ends_of_attempt, verdict
from crysforge.launch.cluster.executors import end_local
from crysforge.launch.cluster.runs import SILENT_S, RunState, read_run, run_directories
from crysforge.launch.cluster.submission import Submission, run_finished, slurm_states
from crysforge.launch.cluster.worker import cancelled

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
class RunStatus:
    """One row of the table."""

    name: str
    state: str
    """finished, running, pending, cancelled, failed, …"""
    run: RunState = field(default_factory=RunState)
    """What its run directory says."""
    node: str = ""
    retries: str = ""
    """Attempts after the first."""
    reason: str = ""
    """Why a run failed, or what is odd about it."""

    @property
    def active(self) -> bool:
        """Whether a job of it waits or runs."""
        return self.state not in ("finished", "not started", "unfinished") and not self.ended

    @property
    def ended(self) -> bool:
        """Whether the run ended without being finished."""
        return self.state in _ENDED


_ENDED = {s.lower().replace("_", " ") for s in _OVER} | {"stopped", "lost", "crashed"}


def statuses(path: str | Path) -> list[RunStatus]:
    """Status of all runs of a submission, or of the run directories at or under a path.

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
        RunStatus(name, "finished" if run_finished(path) else "unfinished", run, run.nodes)
        for name, path in runs.items()
        for run in [read_run(path)]
    ]


def of_submission(submission: Submission) -> list[RunStatus]:
    """Status of each run of a submission."""
    ids = [i for cluster, i in map(submission.job_id, submission.runs) if cluster == "slurm"]
    known = slurm_states(ids)
    return [_of_run(submission, run, known) for run in submission.runs]


def _of_run(
    submission: Submission, run: str, known: Mapping[str, tuple[str, str]] | None
) -> RunStatus:
    events = EventLog(submission.folder, run).read()
    starts = [e for e in events if e["event"] == "start"]
    cluster, id = submission.job_id(run)
    slurm_state, node = (known or {}).get(id, ("", "")) if cluster == "slurm" else ("", "")
    status = RunStatus(run, "", read_run(submission.output(run)))
    status.node = node or (starts[-1].get("node", "") if starts else "")
    status.retries = str(len(starts) - 1) if len(starts) > 1 else ""
    status.state = _state(submission, run, slurm_state, known is not None)
    if status.state in ("failed", "crashed"):
        status.reason = _reason(submission, run, id)
    elif status.state == "running" and status.run.silent > SILENT_S:
        status.reason = f"no step for {status.run.silent / 60:.0f} minutes"
    return status


def _state(submission: Submission, run: str, slurm_state: str, reachable: bool) -> str:
    """One word for where a run stands."""
    if submission.finished(run):
        return "finished"
    if slurm_state and slurm_state not in _OVER:
        return slurm_state.lower()
    cluster, id = submission.job_id(run)
    events = [e for e in EventLog(submission.folder, run).read() if e.get("job") == id or not id]
    last = events[-1]["event"] if events else ""
    if cluster == "local" and last in ("start", "requeue"):
        return "running" if alive(int(id), submission.folder) else "lost"
    if last == "start":  # nobody was left to sum up
        ends = ends_of_attempt(submission.folder, run, id, events[-1].get("attempt", 0))
        last = verdict(ends, 0)["event"] if ends else last
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


def table(rows: Sequence[RunStatus]) -> str:
    """The status of all runs as text, with the reasons of failures below. Columns that say nothing
    are left out."""
    columns = {
        "run": [r.name for r in rows],
        "state": [r.state for r in rows],
        "step": [r.run.step for r in rows],
        "loss/MAE": [r.run.value for r in rows],
        "s/step": [r.run.seconds for r in rows],
        "data wait": [r.run.wait for r in rows],
        "GB": [r.run.memory for r in rows],
        "skipped": [r.run.skipped for r in rows],
        "quarantined": [r.run.quarantined for r in rows],
        "node": [r.node for r in rows],
        "on": [r.run.devices for r in rows],
        "retries": [r.retries for r in rows],
    }
    shown = [[head, *texts] for head, texts in columns.items() if any(texts)]
    lines = [
        "  ".join(
            text.ljust(max(map(len, column))) for text, column in zip(row, shown, strict=True)
        ).rstrip()
        for row in zip(*shown, strict=True)
    ]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.state] = counts.get(row.state, 0) + 1
    lines.append(", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    lines += [f"{r.name}: {r.reason}" for r in rows if r.reason]
    return "\n".join(lines)


def collect(path: str | Path) -> tuple[Path, int, int]:
    """Gathers every run's metrics.json into PATH/results.csv, one row for each, whether it finished
    or not; returns the file, its rows, and how many of them have results.

    Raises:
        ValueError: there is neither a submission nor a run.
    """
    submission = Submission.find(path)
    rows: list[dict[str, Any]] = []
    done = 0
    for status in statuses(path):
        if submission is not None:
            run = submission.output(status.name)
            values = submission.runs[status.name]["values"]
        else:
            run, values = run_directories(Path(path))[status.name], {}
        metrics: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            metrics = read_mapping(run / "metrics.json")
        done += bool(metrics)
        row = {"run": status.name, "state": status.state, **dict(_flat(values))}
        rows.append({**row, **{k: v for k, v in _flat(metrics) if k not in row}})
    if not Path(path).is_dir():
        raise ValueError(f"nothing to collect yet: {path} does not exist")
    output = Path(path) / "results.csv"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(output) as file:
        write = row_writer(file)
        write(columns)
        for row in rows:
            write([row.get(column, "") for column in columns])
    return output, len(rows), done


def cancel(path: str | Path) -> int:
    """Ends all jobs of a submission that wait or run; returns how many.

    Raises:
        ValueError: there is no submission, or Slurm refuses or does not answer.
    """
    submission = Submission.find(path)
    if submission is None:
        raise ValueError(f"{path} was not submitted: there is no {Submission.folder_of(path)}")
    write_text(submission.folder / "cancelled", "")
    ids: dict[str, set[str]] = {"slurm": set(), "local": set(), "debug": set()}
    for entry in submission.history:
        ids[entry["cluster"]] |= set(entry["ids"].values())
    ended = sum(end_local(int(id), submission.folder) for id in ids["local"])
    known = slurm_states(ids["slurm"])
    if known is None:
        raise ValueError(
            "squeue does not answer: no Slurm job was cancelled, but none of them will ask for "
            "another attempt; try again"
        )
    left = sorted(id for id in ids["slurm"] if known.get(id, ("COMPLETED",))[0] not in _OVER)
    if left:
        done = subprocess.run(["scancel", *left], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"scancel: {done.stderr.strip()}")
    return ended + len(left)


def _reason(submission: Submission, run: str, id: str) -> str:
    """Which process ended a job and how, with the line of its log that names the error, or else the
    last one."""
    events = [e for e in EventLog(submission.folder, run).read() if e.get("job") == id]
    if events and events[-1].get("reason"):
        return f"not started again: {events[-1]['reason']}"
    end: dict[str, Any] = next((e for e in reversed(events) if "code" in e), {})
    words = []
    if end.get("rank"):
        words.append(f"rank {end['rank']} on {end.get('node', '')}")
    if end.get("code", 0) < 0:
        words.append(f"killed by signal {-end['code']}")
    pattern = f"{id}_{end.get('rank', '*')}_log.out"
    lines: list[str] = []
    for path in sorted((submission.folder / "logs").glob(pattern)):
        with open(own_file(path), "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            text = file.read().decode("utf-8", errors="replace")
        lines += [x.strip() for x in text.replace("\r", "\n").splitlines() if x.strip()]
    named = [x for x in lines if x.startswith("error: ")]
    words.append(one_line((named or lines or [f"no output in {submission.folder / 'logs'}"])[-1]))
    return ": ".join(words)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted columns; lists as words."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", " ".join(map(str, item)) if isinstance(item, list) else item
