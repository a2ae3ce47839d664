"""What the files of a run, a model, an ensemble and a suite hold: the form that each is held
against when it is read (datapipe/common/checked.py)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from crysforge.datapipe.common.checked import (
    Count,
    Hash,
    Inside,
    Line,
    Name,
    Number,
    Seconds,
    Split,
    between,
    either,
    mapped,
    matching,
    sized,
    table_of,
)
from crysforge.datapipe.storage.manifest import Target

StageName = Annotated[str, matching("[a-z][a-z0-9_]{0,60}", "the name of a stage")]
TagName = Annotated[str, matching(r"[a-z][a-z0-9_]{0,60}-\d{8}", "the name of a checkpoint")]

RUN = {
    "schema?": Count,
    "version?": Name,
    "identity?": {"stages?": list[StageName], "*": Any},
    "finished?": list[StageName],
    "rewound?": TagName | None,
    "*": Any,
}
"""run.json; what continues a run also compares its identity, value by value."""
OWNER = {"host": Name, "pid": Count, "id": Annotated[str, matching("[0-9a-f]{16}", "an id")]}
COMPLETE = {
    "model.safetensors": Hash,
    "state.json": Hash,
    "optimizer.safetensors?": Hash,
    "best.safetensors?": Hash,
    "average.safetensors?": Hash,
    "config.yaml?": Hash,
    "MILESTONE?": Hash,
}
"""The marker of a checkpoint: the hash of each of its files."""
_AVERAGES = dict[Name, float]
STATE = {
    "schema?": Literal[1],
    "saved_at?": Seconds,
    "code?": dict[Name, Line],
    "stream": {
        "steps": Count,
        "position": Count,
        "data": Hash,
        "selection": Hash,
        "seed": int,
        "shuffle": Count,
        "lanes": Count,
    },
    "best": float,
    "result": {
        "steps": Count,
        "train": _AVERAGES,
        "validation": _AVERAGES,
        "best_step": Count,
        "stale?": Count,
    },
    "meter": {"names": list[Name], "sums": list[float]},
    "skipped": Count,
    "skipped_in_row": Count,
    "losses": Annotated[list[float], sized(0, 1000)],
}
"""state.json of a checkpoint that a training goes on from."""

HEARTBEAT = {
    "time?": Seconds, "status": Name, "stage?": StageName, "step": Count, "total": Count,
    "rank?": Count, "ranks?": Count, "host?": Name, "pid?": Count,
}  # fmt: skip
LOGGED = {"stage": StageName, "step": Count, "*": float}
"""A line of metrics.jsonl."""
EVENT = {
    "event": Name, "time?": Seconds, "stage?": StageName, "rank?": Count, "ranks?": Count,
    "host?": Name, "device?": Name, "gpu?": Line, "item?": Count,
}  # fmt: skip
"""A line of events/rank-*.jsonl, as far as others look at it."""

SCORES = {"n?": Count, "mae": float, "rmse?": float, "r2?": float, "*": Any}
"""Errors of a target on a split."""
_SPLIT = either(SCORES, mapped(Name, SCORES))
_PER_TARGET = dict[Name, dict[Name, float]]
METRICS = {
    "targets": Annotated[list[Name], sized(1, 10_000)],
    "units": dict[Name, Line],
    "encoder": Name,
    "labels": Count,
    "data": Name,
    "seed": int,
    "init_from?": str,
    "val?": _SPLIT,
    "test?": _SPLIT,
    "baselines?": _PER_TARGET,
    "seconds?": float,
    "steps?": Count,
    "best_step?": Count,
}
"""metrics.json of a finetuning."""
SHOWN = {key: METRICS[key] for key in ("units", "val?", "test?")}
"""What a table of runs shows of it."""

DATA = {
    "fingerprint?": Name,
    "labels?": Count | None,
    "fold?": Count | None,
    "splits?": dict[Split, Count],
    "targets?": mapped(Name, table_of(Target)),
    "elements?": Annotated[list[Number], sized(0, 118)],
    "provenance?": dict[str, Any] | None,
    "*": Any,
}
"""What a model says of its data."""
START: dict[str, Any] = {"stage": StageName, "weights_sha256": Hash, "data": DATA}
START["start"] = either(START, None)
"""What a model says of the one that it started from."""
MODEL = {
    "schema": Count,
    "stage": StageName,
    "targets?": list[Name],
    "encoder": dict[str, Any],
    "settings": dict[str, Any],
    "data": DATA,
    "start?": either(START, None),
    "version?": Line,
    "versions?": either(dict[Name, Line | int | float | None], None),
    "license?": Line,
    "checkpoint?": Annotated[str, matching(r"|[a-z][a-z0-9_]{0,60}-\d{8}", "a checkpoint's name")],
    "training?": dict[str, Any],
    "results?": dict[str, Any],
    "parameters?": {"encoder": Count, "total": Count},
}
"""config.yaml of a model; encoder and settings are held against their own classes."""
ENSEMBLE = {
    "schema": Count,
    "members": Annotated[int, between(2, 1000)],
    "scale": Annotated[list[Annotated[float, between(1e-300, 1e300)]], sized(1, 10_000)],
}

_Plain = Line | int | float | bool | None
SUITE = {
    "schema": Count,
    "title": Name,
    "baseline": Line | None,
    "factors": list[Name],
    "replicate?": Line | list[Name] | None,
    "paper?": Line | None,
    "runs": mapped(
        Name,
        {
            "path": Inside,
            "job": Literal["finetune", "pretrain"],
            "values": dict[Name, _Plain | list | dict],
        },
    ),
}
"""suite.json."""
