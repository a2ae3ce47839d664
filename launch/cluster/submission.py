"""What was submitted: a folder beside the output with the cells, their configs, a copy of the code
and the logs.

    OUTPUT.submit/submission.json       cells, and each submission of them with its job ids
    OUTPUT.submit/cells/<cell>.yaml     config of a cell, as its job reads it
    OUTPUT.submit/code-<n>/             the repository at the nth submission
    OUTPUT.submit/logs/                 output of the jobs, and submitit's own files
    OUTPUT.submit/events/<cell>.jsonl   turns of a cell: started, stopped, requeued, …
    OUTPUT.submit/events/<cell>/        the same of each of its processes
    OUTPUT.submit/cancelled             there if it was cancelled: no job asks for another turn
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from crysforge.datapipe.common.checked import (
    Line,
    Name,
    Part,
    Seconds,
    checked,
    mapped,
    matching,
)
from crysforge.datapipe.common.safe_read import read_mapping, to_yaml
from crysforge.launch.cluster.events import JobId
from crysforge.trainer.runs.forms import RUN

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1
SUFFIX = ".submit"
MAX_RECORD = 1 << 26
"""Bytes of the longest record."""
JOB = Literal["pretrain", "finetune", "prepare", "predict", "suite"]
_Output = Annotated[str, matching(r"\.\./[^\0-\x1f]{1,4000}", "a path beside the folder")]
FORM = {
    "schema": int,
    "job": JOB,
    "cells": mapped(Part, {"output": _Output, "values": dict[Name, Any], "job?": JOB}),
    "attempts": [
        {
            "cluster": Literal["slurm", "local", "debug"],
            "time": Seconds,
            "code": Part,
            "commit": Line,
            "ids": dict[Part, JobId],
        }
    ],
}
"""submission.json."""
PACKAGES = ("datapipe", "models", "trainer", "launch", "configs")


@dataclass
class Submission:
    """A folder of cells that were submitted, once or more often."""

    folder: Path
    job: str = ""
    """Name of the launch script, or `suite`."""
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Cell → `output` (relative to the folder), the swept `values` and its `job`."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Submissions: `cluster`, `time`, `code`, `commit`, and `ids`: cell → job id."""

    @staticmethod
    def folder_of(output: str | Path) -> Path:
        """Where the submission of an output is kept."""
        path = Path(output).absolute()
        return path.with_name(path.name + SUFFIX)

    @classmethod
    def find(cls, path: str | Path) -> Submission | None:
        """The submission at a path: its folder, or the output it is for."""
        for folder in (Path(path).absolute(), cls.folder_of(path)):
            if (folder / "submission.json").is_file():
                return cls.read(folder)
        return None

    @classmethod
    def read(cls, folder: Path) -> Submission:
        """Raises ValueError if the folder's record cannot be understood."""
        path = folder / "submission.json"
        record = read_mapping(path, FORM, MAX_RECORD, SCHEMA)
        found = cls(folder, record["job"], record["cells"], record["attempts"])
        for cell in found.cells:
            if not found.output(cell).is_relative_to(folder.parent):
                raise ValueError(f"{path} is damaged: the output of {cell} is not beside it")
        return found

    def write(self) -> None:
        """Replaces the record in one step."""
        record = {
            "schema": SCHEMA,
            "job": self.job,
            "cells": self.cells,
            "attempts": self.attempts,
        }
        replace_text(self.folder / "submission.json", json.dumps(record, indent=1) + "\n")

    def output(self, cell: str) -> Path:
        """What a cell writes."""
        return Path(os.path.normpath(self.folder / self.cells[cell]["output"]))

    def add(
        self, cell: str, output: str, values: Mapping[str, Any], config: Mapping, job: str = ""
    ) -> Path:
        """Notes a cell and writes its config; returns the config's path."""
        checked(Part, cell, "the submission", "the name of a cell")
        if not Path(os.path.abspath(output)).is_relative_to(os.path.abspath(self.folder.parent)):
            raise ValueError(
                f"{output} lies elsewhere than {self.folder.parent}: submit what is to lie in "
                "another directory on its own"
            )
        self.cells[cell] = {
            "output": os.path.relpath(output, self.folder),
            "values": dict(values),
            "job": job or self.job,
        }
        path = self.folder / "cells" / f"{cell}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, to_yaml(dict(config)))
        return path

    def job_id(self, cell: str) -> tuple[str, str]:
        """(cluster, id) of a cell's last submission; empty where it has none."""
        for attempt in reversed(self.attempts):
            if cell in attempt["ids"]:
                return attempt["cluster"], attempt["ids"][cell]
        return "", ""

    def finished(self, cell: str) -> bool:
        """Whether a cell has all it was to write."""
        output, job = self.output(cell), self.cells[cell].get("job", self.job)
        if job in ("pretrain", "finetune"):
            return run_finished(output)
        return (output / "manifest.json").is_file() if job == "prepare" else output.is_file()

    def snapshot(self) -> Path:
        """Copies the code for the next submission; what is edited afterwards does not reach it."""
        path = self.folder / f"code-{len(self.attempts) + 1}"
        shutil.rmtree(path, ignore_errors=True)
        for name in code_files(ROOT):
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
        return path


def code_files(root: Path) -> list[str]:
    """What a job's code consists of, relative to the root: the files that git tracks, as they are
    now, and new ones in the packages that it does not ignore; without git, the packages."""
    names = _git(root, "ls-files", "-z").split("\0")
    names += _git(root, "ls-files", "-z", "--others", "--exclude-standard", *PACKAGES).split("\0")
    if not any(names):
        files = (p for name in PACKAGES for p in (root / name).rglob("*"))
        names = [str(p.relative_to(root)) for p in files if "__pycache__" not in p.parts]
    return sorted({n for n in names if n and ((root / n).is_file() or (root / n).is_symlink())})


def commit(root: Path) -> str:
    """Hash of the checked-out commit, with `+` if files differ from it; empty without git."""
    head = _git(root, "rev-parse", "HEAD").strip()
    return head + ("+" if head and _git(root, "status", "--porcelain", "-uno") else "")


def run_finished(path: Path) -> bool:
    """Whether a run directory's record names all its stages as finished."""
    try:
        run = read_mapping(path / "run.json", RUN)
        stages = run["identity"].get("stages", ["finetune"])
        return set(stages) <= set(run["finished"])
    except (ValueError, KeyError):
        return False


def replace_text(path: Path, text: str) -> None:
    """Replaces a file's content in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def new_attempt(cluster: str, code: Path, ids: Mapping[str, str]) -> dict[str, Any]:
    """A record for `Submission.attempts`."""
    return {
        "cluster": cluster,
        "time": round(time.time(), 3),
        "code": code.name,
        "commit": commit(ROOT),
        "ids": dict(ids),
    }


def slurm_states(ids: Iterable[str]) -> dict[str, tuple[str, str]] | None:
    """(state, node list) by job id, of jobs that Slurm still knows; None if it does not answer."""
    jobs = sorted({i.split("_")[0] for i in ids})
    if not jobs:
        return {}
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N"]
    done = subprocess.run([*command, f"--jobs={','.join(jobs)}"], capture_output=True, text=True)
    if done.returncode:  # Slurm says so of jobs it has forgotten, if there are no others
        return {} if "Invalid job id" in done.stderr else None
    lines = [line.strip().split("|") for line in done.stdout.splitlines() if line.strip()]
    return {id: (state, node) for id, state, node in lines}


def _git(root: Path, *args: str) -> str:
    """Output of a git command about a repository; empty if that fails, or `root` is not the top
    of one."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""
