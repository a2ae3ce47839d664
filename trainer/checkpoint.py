"""Run directories: what a run is, where it stood, and what it made.

    RUN/config.yaml                  the resolved config
    RUN/run.json                     identity (data, encoder, stages, seed) and finished stages
    RUN/metrics.jsonl                one line per logged step and validation
    RUN/tensorboard/<stage>/         event files
    RUN/checkpoints/<stage>-<step>/  model, optimizer, state.json, and COMPLETE, written last
    RUN/<stage>/                     what a finished stage hands on: see trainer/export.py

A checkpoint holds full fp32 tensors, no shards: any number of ranks, any ZeRO stage and either
engine can continue from it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from models import __version__
from trainer.files import (
    load_tensors,
    read_json,
    remove_tree,
    save_tensors,
    write_json,
    write_text,
)

SCHEMA = 1
_TAG = re.compile(r"^([a-z][a-z0-9_]*)-(\d{8})$")


@dataclass
class Checkpoint:
    """One moment of a run."""

    stage: str
    step: int
    state: dict[str, Any]
    """JSON: stream state, best so far, running counts."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best validation so far, where the stage keeps the best."""


class RunDirectory:
    """A run on disk. Rank 0 writes; every rank may read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def start(self, config_yaml: str, identity: Mapping[str, Any], resume: str) -> dict[str, Any]:
        """Claims the directory for a run, new or continued, and returns its run.json.

        Args:
            config_yaml: the resolved config.
            identity: JSON values that must be equal when a run is continued.
            resume: `auto` continues a run that is there and else starts one; `must` insists on
                one; `never` insists on an empty directory.

        Raises:
            ValueError: the directory holds something else, or a run with another identity.
        """
        marker = self.path / "run.json"
        identity = dict(identity)
        if marker.is_file():
            if resume == "never":
                raise ValueError(
                    f"{self.path} already holds a run: choose another run_dir, or resume=auto"
                )
            run = read_json(marker)
            if run.get("schema") != SCHEMA:
                raise ValueError(
                    f"{marker} has schema {run.get('schema')!r}, this version reads {SCHEMA}"
                )
            for key in identity.keys() | run["identity"].keys():
                old, new = run["identity"].get(key), identity.get(key)
                if old != new:
                    raise ValueError(
                        f"{self.path} holds a run with another {key}: {_brief(old, new)}; "
                        "choose another run_dir, or give the settings it was started with"
                    )
            return run
        if resume == "must":
            raise ValueError(f"resume=must, but {self.path} holds no run")
        if self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run: choose another run_dir")
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", config_yaml)
        run = {"schema": SCHEMA, "version": __version__, "identity": identity, "finished": []}
        write_json(marker, run)
        return run

    def read(self) -> dict[str, Any]:
        """The run.json of an existing run; ValueError if this is none."""
        marker = self.path / "run.json"
        if not marker.is_file():
            raise ValueError(f"{self.path} is not a run directory (it has no run.json)")
        return read_json(marker)

    def finish(self, stage: str) -> None:
        """Notes that a stage is done, and drops its checkpoints: what it made is exported."""
        run = self.read()
        if stage not in run["finished"]:
            run["finished"].append(stage)
            write_json(self.path / "run.json", run)
        for path in self.tags(stage):
            remove_tree(path)

    def tags(self, stage: str) -> list[Path]:
        """Complete checkpoints of a stage, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = []
        for path in self.checkpoints.iterdir():
            match = _TAG.match(path.name)
            if match and match[1] == stage and (path / "COMPLETE").is_file():
                found.append(path)
        return sorted(found)

    def save(self, checkpoint: Checkpoint, keep: int) -> Path:
        """Writes a checkpoint, its completeness marker last, and prunes older ones."""
        tag = f"{checkpoint.stage}-{checkpoint.step:08d}"
        path, work = self.checkpoints / tag, self.checkpoints / f".{tag}.tmp"
        remove_tree(work)
        work.mkdir(parents=True)
        save_tensors(work / "model.safetensors", checkpoint.model)
        save_tensors(work / "optimizer.safetensors", checkpoint.optimizer)
        if checkpoint.best:
            save_tensors(work / "best.safetensors", checkpoint.best)
        state = {"schema": SCHEMA, "saved_at": time.time(), **checkpoint.state}
        write_json(work / "state.json", state)
        write_text(work / "COMPLETE", "")
        remove_tree(path)
        work.rename(path)
        for old in self.tags(checkpoint.stage)[:-keep]:
            (old / "COMPLETE").unlink()
            remove_tree(old)
        return path

    def latest(self, stage: str) -> Checkpoint | None:
        """The newest complete checkpoint of a stage."""
        tags = self.tags(stage)
        return self.load(tags[-1]) if tags else None

    def load(self, path: Path) -> Checkpoint:
        """A checkpoint from its directory."""
        match = _TAG.match(path.name)
        assert match is not None
        best = path / "best.safetensors"
        return Checkpoint(
            stage=match[1],
            step=int(match[2]),
            state=read_json(path / "state.json"),
            model=load_tensors(path / "model.safetensors"),
            optimizer=load_tensors(path / "optimizer.safetensors"),
            best=load_tensors(best) if best.is_file() else {},
        )


def _brief(old: Any, new: Any) -> str:
    """The part of two JSON values that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return f"{key}: {_brief(old.get(key), new.get(key))}"
    return f"{old!r} there, {new!r} here"
