"""What run directories say about themselves while they are written: how far, how fast, where."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.safe_read import read_lines, read_mapping
from crysforge.launch.cluster.submission import SUFFIX
from crysforge.trainer.runs.forms import EVENT, HEARTBEAT, LOGGED, SHOWN

SILENT_S = 900.0
"""Seconds without a step after which a run that should be training is named."""


@dataclass
class RunState:
    """A run as its files show it; empty where they say nothing."""

    step: str = ""
    """Stage, newest step, and how many there are: `vae 120/5000`."""
    value: str = ""
    """MAE on the test or validation split, or the loss."""
    seconds: str = ""
    """Seconds per step."""
    wait: str = ""
    """Share of that time spent waiting for data."""
    skipped: str = ""
    """Updates left out, as loss or gradient were not finite."""
    quarantined: str = ""
    """Crystals that could not be used."""
    memory: str = ""
    """Peak memory of rank 0, in GB."""
    nodes: str = ""
    devices: str = ""
    """What it ran on when it last started: `2 cpu`, `8 NVIDIA L40`."""
    silent: float = 0.0
    """Seconds since the last step of a run that was neither finished nor stopped."""


def read_run(run: Path) -> RunState:
    """The state of a run directory, as far as its files can be understood."""
    state = RunState()
    for read in (_from_metrics, _from_events, _from_heartbeat, _from_results):
        with contextlib.suppress(ArithmeticError, KeyError, OSError, TypeError, ValueError):
            read(run, state)
    return state


def _from_metrics(run: Path, state: RunState) -> None:
    """The newest stage's newest numbers: validation MAE before validation loss before loss."""
    stage: str = ""
    last: dict[str, Any] = {}
    for line in _tail(run / "metrics.jsonl"):
        if line["stage"] != stage:
            stage, last = line["stage"], {}
        last.update(line)
    if not last:
        return
    state.step = f"{stage} {last.get('step', '')}"
    maes = [v for k, v in last.items() if k.startswith("val/mae")]
    for values, name in (
        (maes, "val MAE"),
        ([last.get("val/loss")], "val loss"),
        ([last.get("train/loss")], "loss"),
    ):
        if values and values[0] is not None:
            state.value = f"{name} {values[0]:.4g}"
            break
    if last.get("speed/steps_per_s"):
        state.seconds = f"{1 / last['speed/steps_per_s']:.3g}"
    if "speed/data_wait" in last:
        state.wait = f"{last['speed/data_wait']:.0%}"
    if "memory/peak_gb" in last:
        state.memory = f"{last['memory/peak_gb']:.3g}"
    state.skipped = f"{last['optim/skipped']:.0f}" if last.get("optim/skipped") else ""


def _from_events(run: Path, state: RunState) -> None:
    """What every rank has noted: where it last started, and the crystals it left out."""
    starts: dict[int, dict[str, Any]] = {}
    bad = set()
    for path in (run / "events").glob("rank-*.jsonl"):
        for _, event in read_lines(path, EVENT):
            if event["event"] in ("start", "resume"):
                starts[event["rank"]] = event
            elif event["event"] == "quarantine":
                bad.add((event["stage"], event["item"]))
    ranks = starts[0]["ranks"] if 0 in starts else 0
    places = [starts[rank] for rank in sorted(starts) if rank < ranks]
    devices = Counter(p.get("gpu") or p["device"].split(":")[0] for p in places)
    state.nodes = ",".join(dict.fromkeys(place["host"] for place in places))
    state.devices = ", ".join(f"{n} {device}" for device, n in devices.items())
    state.quarantined = str(len(bad)) if bad else ""


def _from_heartbeat(run: Path, state: RunState) -> None:
    beat = read_mapping(run / "heartbeat.json", HEARTBEAT)
    state.step = f"{beat['stage']} {beat['step']}/{beat['total']}"
    if beat["status"] == "running":
        state.silent = max(0.0, time.time() - beat["time"])


def _from_results(run: Path, state: RunState) -> None:
    """The final MAE of a finetuning, with its unit."""
    metrics = read_mapping(run / "metrics.json", SHOWN)
    for split in ("val", "test"):
        if isinstance(metrics.get(split, {}).get("mae"), float):
            unit = " ".join(metrics["units"].values())
            state.value = f"{split} MAE {metrics[split]['mae']:.4g} {unit}".strip()


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


def _tail(path: Path, size: int = 65536) -> Iterator[dict[str, Any]]:
    """The last lines of a log of numbers, as many as fit the size."""
    with contextlib.suppress(OSError):
        for _, line in read_lines(path, LOGGED, max(0, path.stat().st_size - size)):
            yield line
