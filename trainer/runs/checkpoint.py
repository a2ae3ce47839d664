"""Run directories: what a run is, where it stood, and what it made.

    RUN/config.yaml                  the resolved config
    RUN/run.json                     identity (data, encoder, stages, seed) and finished stages
    RUN/metrics.jsonl                one line per logged step and validation
    RUN/tensorboard/<stage>/         event files
    RUN/events/rank-0000.jsonl       what happened to a rank: start, save, skip, warning, stop …
    RUN/heartbeat.json               where the run is and when it was last seen alive
    RUN/owner.json                   the process that started it last, and may write here
    RUN/skipped/                     batches whose gradient was not finite
    RUN/checkpoints/<stage>-<step>/  tensors, state.json, config.yaml; COMPLETE is written last and
                                     holds the files' hashes; MILESTONE marks one that is kept
    RUN/<stage>/                     what a finished stage hands on: see model_directory.py

A checkpoint holds full fp32 tensors, no shards: any number of ranks, any ZeRO stage and either
engine can continue from it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from crysforge import __version__
from crysforge.datapipe.common.checked import checked
from crysforge.datapipe.common.claims import claim_directory, is_lock_or_temporary, is_unused
from crysforge.datapipe.common.files import (
    check_space,
    make_directory,
    new_directory,
    remove_tree,
    sha256,
    write_json,
    write_text,
)
from crysforge.datapipe.common.safe_read import own_file, read_mapping
from crysforge.trainer.base.tensors import code_version, load_tensors, save_tensors
from crysforge.trainer.runs.forms import COMPLETE, OWNER, RUN

SCHEMA = 1
MAX_RECORD = 1 << 24
"""Bytes of the longest run.json or state.json."""
TAG = re.compile(r"^([a-z][a-z0-9_]*)-(\d{8})$")
"""Name of a checkpoint: stage and step."""
START_S = 60.0
"""Seconds to wait for another process that starts the run too."""
_WRITTEN = re.compile(
    r"checkpoints|events|heartbeat\.json|metrics\.jsonl|owner\.json|skipped|stacks|tensorboard"
    r"|leftover(-\d+)?"
)
"""Names that a running process makes in a run's directory."""
log = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """One moment of a run."""

    stage: str
    step: int
    state: dict[str, Any]
    """JSON: stream state, best so far, running sums."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best validation so far, where the stage keeps the best."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """Running average of the weights, where one is kept."""

    @property
    def tag(self) -> str:
        """Name of its directory."""
        return f"{self.stage}-{self.step:08d}"

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Its tensors by file name."""
        return {name: getattr(self, name) for name in ("model", "optimizer", "best", "average")}

    @contextlib.contextmanager
    def read_state(self, form: Any = dict) -> Iterator[dict[str, Any]]:
        """`state`, for a block that takes something up from it.

        Args:
            form: what it must be, see `datapipe.common.checked`.

        Raises:
            ValueError: it is not what a run saves.
        """
        try:
            yield checked(form, self.state, "state.json")
        except (AttributeError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(
                f"state.json of checkpoint {self.tag} is not what this version saves "
                f"({type(error).__name__}: {error}): restore it, or start a new run"
            ) from error
        except ValueError as error:
            raise ValueError(f"checkpoint {self.tag}: {error}") from error


class RunDirectory:
    """A run on disk. Rank 0 writes; every rank may read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._owner: dict[str, Any] = {}

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def start(self, config_yaml: str, identity: Mapping[str, Any], resume: str) -> dict[str, Any]:
        """Claims the directory for a run, new or continued, and returns its run.json.

        Args:
            config_yaml: the resolved config; replaces that of a continued run.
            identity: JSON values that must be equal when a run is continued.
            resume: `auto` continues a run that is there and else starts one; `must` insists on
                one; `never` insists on an empty directory; the name of a checkpoint goes back to
                it and sets aside what came later. Going back happens once: a requeued job with the
                same command goes on. (Any other `resume` in between makes it possible again.)

        Of processes that start it at the same time one follows the other.

        Raises:
            ValueError: the directory holds something else, a run with another identity, or no
                such checkpoint.
            OSError: a file of the run is a link, a pipe or a device.
        """
        self._is_there(resume)  # looked at first, since the lock leaves a file
        if self.checkpoints.is_symlink():
            self._refuse_links()
            make_directory(self.checkpoints)  # says so; others would be warnings
        busy = f"another process is starting the run in {self.path}: let it finish"
        with claim_directory(self.path.resolve(), busy, wait=START_S):
            if self._is_there(resume):
                return self._continue(config_yaml, dict(identity), resume)
            return self._begin(config_yaml, dict(identity))

    def _is_there(self, resume: str) -> bool:
        """Whether a run is there. Raises ValueError where that does not fit what is asked for, or
        something else is there."""
        marker = self.path / "run.json"
        if marker.is_file():
            if resume == "never":
                raise ValueError(
                    f"{self.path} already holds a run: choose another run_dir, or resume=auto"
                )
            return True
        if resume not in ("auto", "never"):
            raise ValueError(f"resume={resume}, but {self.path} holds no run")
        self._others()
        return False

    def _begin(self, config_yaml: str, identity: dict[str, Any]) -> dict[str, Any]:
        self._set_leftovers_aside()
        run = {"schema": SCHEMA, "version": __version__, "identity": identity, "finished": []}
        write_json(self.path / "run.json", run)  # first: then a kill leaves a run to be continued
        self._own()
        write_text(self.path / "config.yaml", config_yaml)
        return run

    def _others(self) -> list[Path]:
        """What a process of a deleted run may have left in the directory. Raises ValueError if
        something else is there."""
        if is_unused(self.path):
            return []
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is no directory: choose another run_dir")
        found = [p for p in sorted(self.path.iterdir()) if not is_lock_or_temporary(p.name)]
        there = [p for p in found if not _WRITTEN.fullmatch(p.name)]
        if there and not (self.path / "run.json").is_file():  # written by another one meanwhile
            raise ValueError(f"{self.path} is not empty and holds no run: choose another run_dir")
        return found

    def _set_leftovers_aside(self) -> None:
        """Makes room where a run was deleted while it was going on, whose process may have written
        once more."""
        left = [p for p in self._others() if not p.name.startswith("leftover")]
        if not left:
            return
        names = (f"leftover{f'-{i}' * (i > 1)}" for i in itertools.count(1))
        aside = next(self.path / name for name in names if not (self.path / name).exists())
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
        log.warning("what was left of a run that was deleted is now in %s", aside)

    def _continue(self, config_yaml: str, identity: dict[str, Any], resume: str) -> dict[str, Any]:
        run = self.read()
        if run.get("schema") != SCHEMA:
            raise ValueError(
                f"{self.path / 'run.json'} has schema {run.get('schema')!r}, "
                f"this version reads {SCHEMA}"
            )
        for key in identity.keys() | run["identity"].keys():
            old, new = run["identity"].get(key), identity.get(key)
            if old != new:
                raise ValueError(
                    f"{self.path} holds a run with another {key}: {_brief(old, new)}; "
                    "choose another run_dir, or give the settings it was started with"
                )
        target = None if resume in ("auto", "must") else resume
        there = [path.name for path in self._complete()]
        if target not in (None, run.get("rewound"), *there):
            raise ValueError(
                f"{self.path} has no checkpoint {target!r}; it has: {', '.join(there) or 'none'}"
            )
        self._refuse_links()
        self._own()
        self._sweep()
        if target != run.get("rewound"):
            if target is not None:
                self._rewind(run, target)
            run["rewound"] = target
            write_json(self.path / "run.json", run)
        config = self.path / "config.yaml"
        if not config.is_file() or config.read_text(encoding="utf-8") != config_yaml:
            write_text(config, config_yaml)
        return run

    def _refuse_links(self) -> None:
        """Raises ValueError for a directory that is a link out of the run: what is written, and
        what is removed, must be its own. (A file that is a link is not replaced.)"""
        root = self.path.resolve()
        for folder, directories, _ in os.walk(root):
            for name in directories:
                path = Path(folder, name)
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    raise ValueError(
                        f"{path} is a symbolic link out of the run, where it would write: put what "
                        "it leads to in its place"
                    )

    def _own(self) -> None:
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "id": secrets.token_hex(8)}
        write_json(self.path / "owner.json", self._owner)

    def check_owner(self) -> None:
        """Makes sure that no other process has started the run since this one did: two would mix
        what they write. A command may be given twice; a node that was given up may still be alive.
        Of a process that did not start it, as ranks above 0, there is nothing to check.

        Raises:
            ValueError: one has. It continues the run, and this process must end. Or the directory
                was deleted or renamed: what would be written now would belong to no run.
        """
        if not self._owner:
            return
        owner = self._owner
        try:
            owner = read_mapping(self.path / "owner.json", OWNER)
        except (OSError, ValueError):  # the next look may tell, unless there is nothing left
            if not (self.path / "run.json").exists():
                raise ValueError(
                    f"{self.path} was deleted or renamed while the run was going on: the same "
                    "command starts it anew, or continues it once it is back in its place"
                ) from None
        if owner["id"] != self._owner["id"]:
            raise ValueError(
                f"{self.path} was started again, by process {owner['pid']} on {owner['host']}: "
                "that one continues the run, this one ends"
            )

    def _sweep(self) -> None:
        """Removes what a killed process left half-written or half-deleted."""
        if self.checkpoints.is_dir():
            for path in self.checkpoints.iterdir():
                half = TAG.match(path.name) and not (path / "COMPLETE").is_file()
                if half or path.name.endswith((".partial", ".tmp")):  # .tmp: earlier versions
                    log.warning("checkpoint not complete, removed: %s", path)
                    remove_tree(path)

    def _rewind(self, run: dict[str, Any], tag: str) -> None:
        """Makes a checkpoint the newest: what came later is renamed, its stage is open again."""
        stage = tag.rpartition("-")[0]
        if stage in run["finished"]:
            del run["finished"][run["finished"].index(stage) :]
        for path in self._complete():
            other = path.name.rpartition("-")[0]
            earlier = path.name <= tag if other == stage else other in run["finished"]
            if not earlier:
                _set_aside(path, "superseded")

    def read(self) -> dict[str, Any]:
        """The run.json of an existing run; ValueError if this is none."""
        marker = self.path / "run.json"
        if not marker.is_file():
            raise ValueError(f"{self.path} is not a run directory (it has no run.json)")
        return {"identity": {}, "finished": [], **read_mapping(marker, RUN, MAX_RECORD)}

    def finish(self, stage: str) -> None:
        """Notes that a stage is done, and drops its checkpoints but milestones: what it made is
        exported."""
        self.check_owner()
        run = self.read()
        if stage not in run["finished"]:
            run["finished"].append(stage)
            write_json(self.path / "run.json", run)
        self._prune(stage, 0)

    def tags(self, stage: str) -> list[Path]:
        """Complete checkpoints of a stage, oldest first."""
        return [path for path in self._complete() if path.name.rpartition("-")[0] == stage]

    def _complete(self) -> list[Path]:
        if not self.checkpoints.is_dir():
            return []
        found = [p for p in self.checkpoints.iterdir() if TAG.match(p.name)]
        return sorted(path for path in found if (path / "COMPLETE").is_file())

    def save(self, checkpoint: Checkpoint, keep: int, milestone: bool = False) -> Path:
        """Writes a checkpoint, its completeness marker last, and prunes older ones.

        Args:
            keep: how many checkpoints of the stage stay, beside milestones.
            milestone: never to be pruned.

        Raises:
            OSError: the disk is full or fails; older checkpoints are as they were.
        """
        path = self.checkpoints / checkpoint.tag
        if (path / "COMPLETE").is_file():
            return path
        make_directory(self.checkpoints, parents=False)  # the run may have been deleted
        if path.exists():  # one that could not be deleted
            _set_aside(path, "damaged")
        with new_directory(path) as work:
            self._write(work, checkpoint)
            if milestone:
                write_text(work / "MILESTONE", "")
            write_json(work / "COMPLETE", {p.name: sha256(p) for p in sorted(work.iterdir())})
        self._prune(checkpoint.stage, keep)
        return path

    def _write(self, work: Path, checkpoint: Checkpoint) -> None:
        parts = {name: tensors for name, tensors in checkpoint.parts().items() if tensors}
        check_space(work, sum(t.nbytes for tensors in parts.values() for t in tensors.values()))
        for name, tensors in parts.items():
            save_tensors(work / f"{name}.safetensors", tensors)
        config = self.path / "config.yaml"
        if config.is_file():
            write_text(work / "config.yaml", config.read_text(encoding="utf-8"))
        about = {"schema": SCHEMA, "saved_at": time.time(), "code": code_version()}
        write_json(work / "state.json", {**about, **checkpoint.state})

    def _prune(self, stage: str, keep: int) -> None:
        tags = [p for p in self.tags(stage) if not (p / "MILESTONE").is_file()]
        for old in tags[: max(0, len(tags) - keep)]:
            (old / "COMPLETE").unlink(missing_ok=True)
            remove_tree(old)

    def latest(self, stage: str) -> Checkpoint | None:
        """The newest checkpoint of a stage that is whole; damaged ones are set aside, for rank 0.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        tags = self.tags(stage)
        for path in reversed(tags):
            try:
                return self.load(path)
            except ValueError as error:
                log.warning("checkpoint set aside: %s", error)
                _set_aside(path, "damaged")
        if tags:
            raise ValueError(
                f"every checkpoint of {self.path} is damaged (see *.damaged in {self.checkpoints}):"
                " restore one, or start a new run"
            )
        return None

    def load(self, path: Path) -> Checkpoint:
        """A checkpoint from its directory. Raises ValueError naming a damaged file."""
        match = TAG.match(path.name)
        assert match is not None
        try:
            return self._load(path, match)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is not complete, or being deleted: {error}") from None

    def _load(self, path: Path, match: re.Match[str]) -> Checkpoint:
        hashes = read_mapping(path / "COMPLETE", COMPLETE)
        for name in COMPLETE:
            file, digest = path / name.removesuffix("?"), hashes.get(name.removesuffix("?"))
            if digest is None and file.exists():
                raise ValueError(f"{file} is damaged: COMPLETE has no hash of it")
            if digest is not None and (not file.is_file() or sha256(own_file(file)) != digest):
                raise ValueError(f"{file} is damaged: its content is not what was written")

        def tensors(name: str) -> dict[str, Tensor]:
            file = f"{name}.safetensors"
            return load_tensors(path / file) if file in hashes else {}

        return Checkpoint(
            stage=match[1],
            step=int(match[2]),
            state=read_mapping(path / "state.json", limit=MAX_RECORD),
            **{name: tensors(name) for name in ("model", "optimizer", "best", "average")},
        )


class BackgroundWriter:
    """Does one job at a time in a thread; what it raised comes out of the next `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], Any]) -> None:
        """Begins a job, after waiting for the one before."""
        self.wait()

        def run() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is left to do; raises what the job raised."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_name(f"{path.name}.{why}")
    remove_tree(aside)
    path.rename(aside)


def _brief(old: Any, new: Any) -> str:
    """The part of two JSON values that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return f"{key}: {_brief(old.get(key), new.get(key))}"
    return f"{old!r} there, {new!r} here"
