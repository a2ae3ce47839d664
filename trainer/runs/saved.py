"""Checkpoints of a run on disk (its directory: checkpoint.py), and a thread that writes them."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from crysforge.datapipe.common.checked import checked
from crysforge.datapipe.common.files import (
    check_space,
    make_directory,
    new_directory,
    remove_tree,
    sha256,
    write_json,
    write_text,
)
from crysforge.datapipe.common.places import own_file
from crysforge.datapipe.common.safe_read import read_mapping, read_text
from crysforge.trainer.base.tensors import code_version, load_tensors, save_tensors
from crysforge.trainer.runs.forms import COMPLETE

SCHEMA = 1
MAX_RECORD = 1 << 24
"""Bytes of the longest run.json or state.json."""
TAG = re.compile(r"^([a-z][a-z0-9_]*)-(\d{8})$")
"""Name of a checkpoint: stage and step."""
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


class Checkpoints:
    """The checkpoints of a run, in its directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def tags(self, stage: str) -> list[Path]:
        """Complete checkpoints of a stage, oldest first."""
        return [path for path in self.complete() if path.name.rpartition("-")[0] == stage]

    def complete(self) -> list[Path]:
        """Complete checkpoints of all stages, in order of name."""
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
            set_aside(path, "damaged")
        with new_directory(path) as work:
            self._write(work, checkpoint)
            if milestone:
                write_text(work / "MILESTONE", "")
            write_json(work / "COMPLETE", {p.name: sha256(p) for p in sorted(work.iterdir())})
        self.prune(checkpoint.stage, keep)
        return path

    def _write(self, work: Path, checkpoint: Checkpoint) -> None:
        parts = {name: tensors for name, tensors in checkpoint.parts().items() if tensors}
        check_space(work, sum(t.nbytes for tensors in parts.values() for t in tensors.values()))
        for name, tensors in parts.items():
            save_tensors(work / f"{name}.safetensors", tensors)
        config = self.path / "config.yaml"
        if config.is_file():
            write_text(work / "config.yaml", read_text(config, MAX_RECORD))
        about = {"schema": SCHEMA, "saved_at": time.time(), "code": code_version()}
        write_json(work / "state.json", {**about, **checkpoint.state})

    def prune(self, stage: str, keep: int) -> None:
        """Removes all but the newest checkpoints of a stage, and milestones."""
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
                set_aside(path, "damaged")
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

    def sweep(self) -> None:
        """Removes what a killed process left half-written or half-deleted."""
        if self.checkpoints.is_dir():
            for path in self.checkpoints.iterdir():
                half = TAG.match(path.name) and not (path / "COMPLETE").is_file()
                if half or path.name.endswith((".partial", ".tmp")):  # .tmp: earlier versions
                    log.warning("checkpoint not complete, removed: %s", path)
                    remove_tree(path)


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


def set_aside(path: Path, why: str) -> None:
    """Renames a checkpoint, so that it is none any more."""
    aside = path.with_name(f"{path.name}.{why}")
    remove_tree(aside)
    path.rename(aside)
