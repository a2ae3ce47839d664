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

import itertools
import logging
import os
import re
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crysforge import __version__
from crysforge.datapipe.common.claims import (
    claim_directory,
    is_lock_or_temporary,
    is_unused,
    refuse_links_out,
)
from crysforge.datapipe.common.files import (
    make_directory,
    write_json,
    write_text,
)
from crysforge.datapipe.common.safe_read import read_mapping, read_text
from crysforge.trainer.runs.forms import OWNER, RUN
from crysforge.trainer.runs.saved import MAX_RECORD, SCHEMA, Checkpoints, set_aside

START_S = 60.0
"""Seconds to wait for another process that starts the run too."""
_WRITTEN = re.compile(
    r"checkpoints|events|heartbeat\.json|metrics\.jsonl|owner\.json|skipped|stacks|tensorboard"
    r"|leftover(-\d+)?"
)
"""Names that a running process makes in a run's directory."""
log = logging.getLogger(__name__)


class RunDirectory(Checkpoints):
    """A run on disk. Rank 0 writes; every rank may read."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._owner: dict[str, Any] = {}

    def start(
        self,
        config_yaml: str,
        identity: Mapping[str, Any],
        resume: str,
        defaults: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Claims the directory for a run, new or continued, and returns its run.json.

        Args:
            config_yaml: the resolved config; replaces that of a continued run.
            identity: JSON values that must be equal when a run is continued.
            resume: `auto` continues a run that is there and else starts one; `must` insists on
                one; `never` insists on an empty directory; the name of a checkpoint goes back to
                it and sets aside what came later. Going back happens once: a requeued job with the
                same command goes on. (Any other `resume` in between makes it possible again.)
            defaults: sections of `identity` as they are by default: what stands for settings that
                there were none of when the run was started.

        Of processes that start it at the same time one follows the other.

        Raises:
            ValueError: the directory holds something else, a run with another identity, or no
                such checkpoint.
            OSError: a file of the run is a link, a pipe or a device.
        """
        self._is_there(resume)  # looked at first, since the lock leaves a file
        if self.checkpoints.is_symlink():
            refuse_links_out(self.path)
            make_directory(self.checkpoints)  # says so; others would be warnings
        busy = f"another process is starting the run in {self.path}: let it finish"
        with claim_directory(self.path.resolve(), busy, wait=START_S):
            if self._is_there(resume):
                return self._continue(config_yaml, dict(identity), resume, defaults or {})
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

    def _continue(
        self,
        config_yaml: str,
        identity: dict[str, Any],
        resume: str,
        defaults: Mapping[str, Any],
    ) -> dict[str, Any]:
        run = self.read()
        if run.get("schema") != SCHEMA:
            raise ValueError(
                f"{self.path / 'run.json'} has schema {run.get('schema')!r}, "
                f"this version reads {SCHEMA}"
            )
        for key in identity.keys() | run["identity"].keys():
            old, new = run["identity"].get(key), identity.get(key)
            old = _filled(old, defaults.get(key))
            if old != new:
                raise ValueError(
                    f"{self.path} holds a run with another {key}: {_brief(old, new)}; "
                    "choose another run_dir, or give the settings it was started with"
                )
        target = None if resume in ("auto", "must") else resume
        there = [path.name for path in self.complete()]
        if target not in (None, run.get("rewound"), *there):
            raise ValueError(
                f"{self.path} has no checkpoint {target!r}; it has: {', '.join(there) or 'none'}"
            )
        refuse_links_out(self.path)
        self._own()
        self.sweep()
        if target != run.get("rewound"):
            if target is not None:
                self._rewind(run, target)
            run["rewound"] = target
            write_json(self.path / "run.json", run)
        config = self.path / "config.yaml"
        if (
            config.is_symlink()
            or not config.is_file()
            or read_text(config, MAX_RECORD) != config_yaml
        ):
            write_text(config, config_yaml)
        return run

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

    def _rewind(self, run: dict[str, Any], tag: str) -> None:
        """Makes a checkpoint the newest: what came later is renamed, its stage is open again."""
        stage = tag.rpartition("-")[0]
        if stage in run["finished"]:
            del run["finished"][run["finished"].index(stage) :]
        for path in self.complete():
            other = path.name.rpartition("-")[0]
            earlier = path.name <= tag if other == stage else other in run["finished"]
            if not earlier:
                set_aside(path, "superseded")

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
        self.prune(stage, 0)


def _filled(value: Any, defaults: Any) -> Any:
    """A JSON value with the settings that it lacks."""
    if not isinstance(value, Mapping) or not isinstance(defaults, Mapping):
        return value
    mine = {key: _filled(own, defaults.get(key)) for key, own in value.items()}
    return {**defaults, **mine}


def _brief(old: Any, new: Any) -> str:
    """The part of two JSON values that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return f"{key}: {_brief(old.get(key), new.get(key))}"
    return f"{old!r} there, {new!r} here"
