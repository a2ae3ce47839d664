"""Every field of every file of ours is checked: a value of no sense there is one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from crysforge.datapipe.common.checked import checked
from crysforge.datapipe.preparing.duplicates.records import OUTCOME
from crysforge.datapipe.storage.manifest import Manifest
from crysforge.launch.cluster.events import EVENT, PROCESS
from crysforge.launch.cluster.submission import FORM as SUBMISSION
from crysforge.trainer.runs import forms
from crysforge.trainer.runs.model_directory import Scaler
from crysforge.trainer.serving.request import REQUEST

DATA = Path(__file__).resolve().parents[1] / "data"
SET, RUN, MODEL = DATA / "schema-1" / "set", DATA / "schema-1" / "run", DATA / "schema-2" / "model"
SAVED = RUN / "checkpoints" / "vae-00000001"


def load(path: Path) -> Any:
    text = path.read_text()
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)


EVENTS = {
    "event": "failed", "time": 1.0, "job": "1_2", "attempt": 0, "rank": 1, "node": "n", "pid": 1,
    "code": 2, "progress": "vae", "ends": 9.0, "no_progress": False, "reason": "r",
}  # fmt: skip
SCORES = {"n": 3, "mae": 0.1, "rmse": 0.1, "r2": 0.9}
DOCUMENTS: dict[str, tuple[Any, Any]] = {
    "manifest.json": (Manifest, load(SET / "manifest.json")),
    "run.json": (forms.RUN, load(RUN / "run.json") | {"rewound": "vae-00000001"}),
    "owner.json": (forms.OWNER, {"host": "h", "pid": 1, "id": "0" * 16}),
    "COMPLETE": (forms.COMPLETE, load(SAVED / "COMPLETE")),
    "state.json": (forms.STATE, load(SAVED / "state.json")),
    "config.yaml": (forms.MODEL, load(MODEL / "config.yaml")),
    "scaler.json": (Scaler, load(MODEL / "scaler.json")),
    "ensemble.json": (forms.ENSEMBLE, {"schema": 1, "members": 2, "scale": [1.0]}),
    "metrics.json": (
        forms.METRICS,
        {
            "targets": ["a"], "units": {"a": "eV"}, "encoder": "e", "labels": 3, "data": "f",
            "seed": 0, "init_from": "none", "val": {**SCORES},
            "test": {"a": {**SCORES}, "b": {**SCORES}},
            "baselines": {"a": {"mean": 1.0}}, "seconds": 2.0, "steps": 1, "best_step": 1,
        },
    ),
    "heartbeat.json": (
        forms.HEARTBEAT,
        {
            "time": 1.0, "status": "running", "stage": "vae", "step": 1, "total": 2, "rank": 0,
            "ranks": 1, "host": "h", "pid": 1,
        },
    ),
    "metrics.jsonl": (forms.LOGGED, {"stage": "vae", "step": 1, "train/loss": 0.5}),
    "events/rank-0000.jsonl": (
        forms.EVENT,
        {
            "time": 1.0, "event": "start", "stage": "vae", "rank": 0, "ranks": 1, "host": "h",
            "device": "cpu", "gpu": "", "item": 3,
        },
    ),
    "suite.json": (
        forms.SUITE,
        {
            "schema": 1, "title": "t", "baseline": "a=b", "factors": ["a"], "replicate": "seed",
            "paper": None, "runs": {"c": {"path": "c", "job": "finetune", "values": {"a": "b"}}},
        },
    ),
    "submission.json": (
        SUBMISSION,
        {
            "schema": 1, "job": "finetune",
            "runs": {"a": {"output": "../a", "values": {"x": 1}, "job": "finetune"}},
            "history": [
                {"cluster": "slurm", "time": 1.0, "code": "code-1", "commit": "", "ids": {"a": "1"}}
            ],
        },
    ),
    "events/a.jsonl": (EVENT, EVENTS),
    "events/a/rank-0000.jsonl": (PROCESS, EVENTS),
    "predictions.request.json": (
        REQUEST,
        {"request": "0" * 32, "sha256": "0" * 64, "written": 3, "dropped": 0},
    ),
    "decided.jsonl": (
        OUTCOME,
        {
            "matches": [
                {
                    "item": 0, "id": "a", "formula": "NaCl", "set": 0, "other": 1, "other_id": "b",
                    "by": "id", "rms": None, "largest": 0.1,
                }
            ],
            "undecided": [{"set": 0, "id": "a", "why": "w"}],
            "pairs": {"formula": 1},
        },
    ),
}  # fmt: skip
FREE = {
    "manifest.json": ["provenance"],
    "run.json": ["identity"],
    "config.yaml": ["encoder", "settings", "data.provenance", "training", "results"],
    "metrics.json": [],
    "submission.json": ["runs.a.values"],
    "suite.json": ["runs.c.values"],
}
"""What may hold anything: it is shown, compared or held against a class of its own."""


ALL_OPTIONAL = [("run.json", ()), ("config.yaml", ("data",))]
"""Mappings that lack nothing if they are empty; what is unknown in them is not used."""


def leaves(value: Any, at: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*at, key))
    yield at


FIELDS = [
    pytest.param(name, at, id=f"{name} {'.'.join(map(str, at)) or 'all'}")
    for name, (_, document) in DOCUMENTS.items()
    for at in leaves(document)
    if not ".".join(map(str, at)).startswith(tuple(FREE.get(name, ())) or ("\0",))
]


def test_every_form_holds_what_it_should():
    for name, (form, document) in DOCUMENTS.items():
        checked(form, document, name)


@pytest.mark.parametrize(("name", "at"), FIELDS)
def test_every_field_of_every_format_is_checked(name, at):
    """A value of no sense in its place is one line that names the file and the field."""
    form, document = DOCUMENTS[name]
    for odd in ([["x"]], "x" * 5000 + "\n", 10**40, {"odd": ["x"]}):
        if isinstance(odd, dict) and (name, at) in ALL_OPTIONAL:
            continue
        changed = copy.deepcopy(document)
        holder: Any = {"": changed}
        last: Any = ""
        for key in at:
            holder, last = holder[last], key
        if isinstance(odd, str) and name == "decided.jsonl" and at[-1:] in [("id",), ("other_id",),
                                                                           ("why",)]:  # fmt: skip
            continue  # any text is one
        if isinstance(odd, str) and (name, at) in [("metrics.json", ("init_from",))]:
            continue
        holder[last] = odd
        with pytest.raises(ValueError) as error:
            checked(form, holder[""] if not at else changed, name)
        text = str(error.value)
        assert text.startswith(f"{name} is damaged: ") and text.isprintable() and len(text) < 400
        assert not at or str(at[-1] if isinstance(at[-1], str) else at[-2]) in text


def test_real_files_are_of_their_forms(runs):
    """What runs write now is what they read."""
    for run, stage in ((runs / "pre", "joint"), (runs / "fine", "finetune")):
        checked(forms.RUN, load(run / "run.json"), "run.json")
        checked(forms.OWNER, load(run / "owner.json"), "owner.json")
        checked(forms.HEARTBEAT, load(run / "heartbeat.json"), "heartbeat.json")
        checked(forms.MODEL, load(run / stage / "config.yaml"), "config.yaml")
        for file, form in (("metrics.jsonl", forms.LOGGED), ("events/*.jsonl", forms.EVENT)):
            (path,) = run.glob(file)
            for line in path.read_text().splitlines():
                checked(form, json.loads(line), file)
    checked(forms.METRICS, load(runs / "fine" / "metrics.json"), "metrics.json")
    checked(Scaler, load(runs / "fine" / "finetune" / "scaler.json"), "scaler.json")
