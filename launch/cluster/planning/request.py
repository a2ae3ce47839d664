"""What a command line of `submit` asks for: settings of the cluster, and checked configs of the
job's runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.claims import is_unused
from crysforge.datapipe.common.config import configure
from crysforge.datapipe.common.files import sha256
from crysforge.datapipe.common.names import nearest
from crysforge.launch.cluster import status
from crysforge.launch.cluster.config import SubmitConfig
from crysforge.launch.cluster.planning import sweep
from crysforge.launch.cluster.planning.jobs import JOBS, Job, PlannedRun, check, check_names
from crysforge.launch.cluster.planning.suite import SuitePlan
from crysforge.launch.cluster.submission import Submission
from crysforge.launch.cluster.worker import Task
from crysforge.trainer.base.command_line import (
    RECORDED,
    as_typed,
    help_text,
    merge_sources,
    read_plain,
    split_arguments,
)

_ACTIONS = ("status", "collect", "cancel")
_OWN = {f.name for f in fields(SubmitConfig)} | {"site"}


@dataclass
class Request:
    """A command line, taken apart."""

    config: SubmitConfig
    files: list[str]
    """Config files of the job."""
    overrides: list[str]
    """Overrides of the job."""

    @classmethod
    def parse(cls, argv: Sequence[str], doc: str | None) -> Request:
        """Sorts the arguments into submit's own and the job's.

        Raises:
            ValueError: a malformed argument, an unknown setting, none or two things to do.
        """
        if not argv or "-h" in argv or "--help" in argv:
            print(help_text(SubmitConfig, doc))
            raise SystemExit(0)
        files, overrides = split_arguments(argv)
        own: dict[str, Any] = {}
        theirs = []
        for override in overrides:
            key, _, value = override.partition("=")
            if key.split(".")[0] not in _OWN:
                theirs.append(override)
            elif key == "site":
                own = {**_read_site(value), **own}
            elif key.startswith("slurm."):
                own["slurm"] = {**own.get("slurm", {}), key.removeprefix("slurm."): value}
            else:
                own[key] = value
        config = configure(SubmitConfig, own)
        asked = [a for a in ("job", "suite", *_ACTIONS) if getattr(config, a)]
        if len(asked) != 1:
            raise ValueError(
                f"give one of job=NAME, suite=FILE, status=DIR, collect=DIR, cancel=DIR; "
                f"got {asked or 'none'}"
            )
        if config.job and config.job not in JOBS:
            raise ValueError(f"unknown job {config.job!r}: {nearest(config.job, JOBS)}")
        if asked[0] in _ACTIONS and (files or theirs):
            raise ValueError(f"{asked[0]}=DIR takes no other settings: {[*files, *theirs]}")
        return cls(config, files, theirs)

    @property
    def job(self) -> Job:
        """The launch script."""
        return JOBS[self.config.job]

    @property
    def output(self) -> Path:
        """Where the whole submission writes."""
        return self.suite.output if self.suite else Path(str(self._base[self.job.output]))

    @cached_property
    def suite(self) -> SuitePlan | None:
        """The suite that was asked for, if one was."""
        if not self.config.suite:
            return None
        if self.config.sweep:
            raise ValueError("a suite has factors=… in place of sweep=…")
        return SuitePlan([self.config.suite, *self.files], self.overrides)

    def runs(self) -> list[PlannedRun]:
        """The runs asked for, each checked against the job's own schema.

        Raises:
            ValueError: a setting that the job would refuse, or several processes for a job that
                takes one.
        """
        if self.suite:
            return self.suite.runs
        if self.config.processes > 1 and not self.job.distributed:
            raise ValueError(
                f"{self.config.job} runs in one process, not {self.config.processes}: leave out "
                "nodes and tasks_per_node, and give gpus=1 at most"
            )
        base, schema = self._base, self.job.schema()
        check_names(schema, base, _OWN)
        if not self.config.sweep:
            output = str(base[self.job.output])
            check(self.job, base)
            return [PlannedRun(Path(output).name, output, {}, base, self.config.job)]
        grid = sweep.read_sweep(self.config.sweep)
        runs = []
        for name, values in zip(sweep.names(grid), grid, strict=True):
            check_names(schema, values, _OWN)
            config = sweep.merge(base, {**self._output_of(name, values), **values})
            check(self.job, config)
            runs.append(
                PlannedRun(name, str(config[self.job.output]), values, config, self.config.job)
            )
        outputs = [run.output for run in runs]
        for run in runs:
            if outputs.count(run.output) > 1:
                raise ValueError(f"several runs of the sweep write {run.output}")
        return runs

    def submission(self) -> Submission:
        """The submission this one continues, or a new one."""
        folder, job = Submission.folder_of(self.output), self.config.job or "suite"
        if not (folder / "submission.json").is_file():
            if not is_unused(folder):
                raise ValueError(f"{folder} is not empty and holds no submission")
            return Submission(folder, job)
        submission = Submission.read(folder)
        if submission.job != job:
            raise ValueError(f"{folder} is of a {submission.job} job: choose another output")
        return submission

    def left(self, submission: Submission, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        """Runs to submit: those that neither have finished nor wait or run."""
        left = []
        known = {row.name: row for row in status.of_submission(submission)}
        for run in runs:
            row = known.get(run.name)
            if row is not None and row.state == "unknown":
                raise ValueError(f"{run.name} may still run: squeue does not answer, try later")
            if row is not None and (row.state == "finished" or row.active):
                print(f"{run.name}: {row.state} already")
            else:
                left.append(run)
        return left

    def record(self) -> None:
        """Writes beside the runs of a suite what they are for."""
        if self.suite:
            self.suite.write()

    def tasks(self, submission: Submission, runs: Sequence[PlannedRun], code: Path) -> list[Task]:
        """Writes the runs' configs, and returns their tasks."""
        tasks = []
        for run in runs:
            settings = run.config
            if settings.get("resume") == "never":  # a later attempt finds the run of the first
                if Path(run.output).exists():
                    raise ValueError(f"resume=never, but {run.output} is there already")
                settings = {**settings, "resume": "auto"}
            config = submission.add(run.name, run.output, run.values, settings, run.job)
            tasks.append(
                Task(
                    name=run.name,
                    argv=(
                        str(code / JOBS[run.job].script),
                        *("--config", str(config), f"{RECORDED}{sha256(config)}"),
                    ),
                    folder=str(submission.folder),
                    output=str(submission.output(run.name)),
                    max_requeues=self.config.max_requeues,
                    max_crashes=self.config.max_crashes,
                )
            )
        (submission.folder / "cancelled").unlink(missing_ok=True)
        return tasks

    @cached_property
    def _base(self) -> dict[str, Any]:
        base = merge_sources(self.files, as_typed(self.job.schema(), self.overrides))
        if not base.get(self.job.output):
            raise ValueError(f"setting {self.job.output!r} is required: give {self.job.output}=…")
        return base

    def _output_of(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """The output setting of a run of a sweep: a directory, or file, of its own."""
        output = self.output
        if self.job.output in values:
            return {}
        if self.config.job == "predict":
            return {"output": str(output.with_suffix("") / f"{name}{output.suffix or '.csv'}")}
        return {self.job.output: str(output / name)}


def _read_site(path: str) -> dict[str, Any]:
    """Settings of `submit` from a YAML file, as they are written there: `12:00:00` and `007` are no
    numbers."""
    settings = read_plain(path, "site file", as_written=True) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"site file {path!r} must hold a mapping of settings")
    for key in settings:
        if key not in _OWN - {"site", "job", "suite", "sweep", *_ACTIONS}:
            raise ValueError(f"site file {path!r}: unknown setting {key!r}: {nearest(key, _OWN)}")
    return settings
