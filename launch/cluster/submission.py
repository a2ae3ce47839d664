"""What was submitted: a folder beside the output with the runs, their configs, a copy of the code
and the logs.

    OUTPUT.submit/submission.json       runs, and each submission of them with its job ids
    OUTPUT.submit/configs/<run>.yaml    config of a run, as its job reads it
    OUTPUT.submit/code-<n>/             the repository at the nth submission
    OUTPUT.submit/logs/                 output of the jobs, and submitit's own files
    OUTPUT.submit/events/<run>.jsonl    attempts of a run: started, stopped, requeued, …
    OUTPUT.submit/events/<run>/         the same of each of its processes
    OUTPUT.submit/cancelled             there if it was cancelled: no job asks for another attempt
    OUTPUT.submit/lock                  there while somebody submits
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from crysforge.datapipe.common.checked import Line, Name, Part, Seconds, checked, mapped, matching
from crysforge.datapipe.common.claims import claim_directory, refuse_links_out
from crysforge.datapipe.common.files import remove_tree, write_json, write_text
from crysforge.datapipe.common.safe_read import read_mapping, to_yaml
from crysforge.launch.cluster.code import code_files, commit
from crysforge.launch.cluster.events import JobId
from crysforge.trainer.runs.forms import RUN

SCHEMA = 1
SUFFIX = ".submit"
MAX_RECORD = 1 << 26
"""Bytes of the longest record."""
JOB = Literal["pretrain", "finetune", "prepare", "predict", "suite"]
_Output = Annotated[str, matching(r"\.\./[^\0-\x1f]{1,4000}", "a path beside the folder")]
FORM = {
    "schema": int,
    "job": JOB,
    "runs": mapped(Part, {"output": _Output, "values": dict[Name, Any], "job?": JOB}),
    "history": [
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


@dataclass
class Submission:
    """A folder of runs that were submitted, once or more often."""

    folder: Path
    job: str = ""
    """Name of the launch script, or `suite`."""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Run → `output` (relative to the folder), the swept `values` and its `job`."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Submissions: `cluster`, `time`, `code`, `commit`, and `ids`: run → job id."""

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
        found = cls(folder, record["job"], record["runs"], record["history"])
        for run in found.runs:
            if not found.output(run).is_relative_to(folder.parent):
                raise ValueError(f"{path} is damaged: the output of {run} is not beside it")
        return found

    def write(self) -> None:
        """Replaces the record in one step."""
        record = {
            "schema": SCHEMA,
            "job": self.job,
            "runs": self.runs,
            "history": self.history,
        }
        write_json(self.folder / "submission.json", record)

    def output(self, run: str) -> Path:
        """What a run writes."""
        return Path(os.path.normpath(self.folder / self.runs[run]["output"]))

    def add(
        self, run: str, output: str, values: Mapping[str, Any], config: Mapping, job: str = ""
    ) -> Path:
        """Notes a run and writes its config; returns the config's path."""
        checked(Part, run, "the submission", "the name of a run")
        if not Path(os.path.abspath(output)).is_relative_to(os.path.abspath(self.folder.parent)):
            raise ValueError(
                f"{output} lies elsewhere than {self.folder.parent}: submit what is to lie in "
                "another directory on its own"
            )
        self.runs[run] = {
            "output": os.path.relpath(output, self.folder),
            "values": dict(values),
            "job": job or self.job,
        }
        path = self.folder / "configs" / f"{run}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, to_yaml(dict(config)))
        return path

    def job_id(self, run: str) -> tuple[str, str]:
        """(cluster, id) of a run's last submission; empty where it has none."""
        for entry in reversed(self.history):
            if run in entry["ids"]:
                return entry["cluster"], entry["ids"][run]
        return "", ""

    def finished(self, run: str) -> bool:
        """Whether a run has all it was to write."""
        output, job = self.output(run), self.runs[run].get("job", self.job)
        if job in ("pretrain", "finetune"):
            return run_finished(output)
        return (output / "manifest.json").is_file() if job == "prepare" else output.is_file()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from submitting to the folder meanwhile; if nothing is written to a
        new one, none stays.

        Raises:
            ValueError: another process does so; a part of the folder is a link out of it.
        """
        folder = self.folder.resolve()
        busy = f"another submit is at work in {self.folder}: let it finish, or end it (cancel=…)"
        try:
            with claim_directory(folder, busy):
                refuse_links_out(folder, but="code-")
                yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def snapshot(self) -> Path:
        """Copies the code for the next submission; what is edited afterwards does not reach it."""
        path = self.folder / f"code-{len(self.history) + 1}"
        remove_tree(path)
        for name, file in code_files().items():
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target, follow_symlinks=False)
        return path


def run_finished(path: Path) -> bool:
    """Whether a run directory's record names all its stages as finished."""
    try:
        run = read_mapping(path / "run.json", RUN)
        stages = run["identity"].get("stages", ["finetune"])
        return set(stages) <= set(run["finished"])
    except (ValueError, KeyError):
        return False


def new_entry(cluster: str, code: Path, ids: Mapping[str, str]) -> dict[str, Any]:
    """An entry of `Submission.history`."""
    return {
        "cluster": cluster,
        "time": round(time.time(), 3),
        "code": code.name,
        "commit": commit(),
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
