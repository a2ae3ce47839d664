"""A cluster for the session, and what the tests do with it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from launch import status, submit
from launch.submission import Submission
from launch.task import EventLog
from tests.distributed.conftest import data  # noqa: F401
from tests.distributed.ranks import ROOT
from tests.slurm.cluster import Cluster, missing, wait_for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if missing() and not os.environ.get("CI"):
        reason = f"no Slurm here ({', '.join(missing())}): apt-get install slurm-wlm munge"
        for item in items:
            if item.get_closest_marker("slurm"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@dataclass
class Desk:
    """A user's desk on the login node: a working directory and the commands."""

    cluster: Cluster
    path: Path

    def submit(self, *args: str) -> str:
        """Output of `python launch/submit.py …`, run in this process."""
        printed = io.StringIO()
        with (
            mock.patch.dict(os.environ, {**self.cluster.environ, "OMP_NUM_THREADS": "1"}),
            mock.patch.object(sys, "argv", ["submit.py", *args]),
            contextlib.chdir(self.path),
            contextlib.redirect_stdout(printed),
        ):
            submit.main()
        return printed.getvalue()

    def rows(self, output: str) -> dict[str, status.CellStatus]:
        """Status by cell."""
        with mock.patch.dict(os.environ, self.cluster.environ):
            return {row.cell: row for row in status.statuses(self.path / output)}

    def wait(self, output: str, *, seconds: float = 600) -> dict[str, status.CellStatus]:
        """Status by cell once Slurm has done with all of them."""

        def over() -> bool:
            left = self.cluster.run("squeue", "--noheader", "--format=%F").split()
            jobs = {self.job(output, cell).split("_")[0] for cell in rows}
            return not jobs & set(left)

        rows = self.rows(output)
        self._wait(output, over, f"all jobs of {output} have ended", seconds)
        return self.rows(output)

    def wait_for_step(self, output: str, step: int) -> None:
        """Returns when a run has logged so many steps."""
        self._wait(output, lambda: len(curve(self.path / output)) >= step, f"step {step}", 600)

    def events(self, output: str, cell: str | None = None) -> list[str]:
        """What happened to a cell."""
        folder = Submission.folder_of(self.path / output)
        return [e["event"] for e in EventLog(folder, cell or Path(output).name).read()]

    def job(self, output: str, cell: str | None = None) -> str:
        """Slurm's id of a cell."""
        submission = Submission.find(self.path / output)
        assert submission is not None
        return submission.job_id(cell or Path(output).name)[1]

    @contextlib.contextmanager
    def frozen(self, output: str) -> Iterator[list[int]]:
        """Holds all processes that train a run in mid-step for as long as the block lasts, so that
        what happens meanwhile does not depend on the machine's speed."""
        job = self.job(output)
        found = [p for p in self.cluster.processes(f"SLURM_JOB_ID={job}") if _trains(p)]
        assert found, f"job {job} has no process that trains"
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield found
        finally:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _wait(self, output: str, condition: Callable[[], bool], what: str, seconds: float) -> None:
        try:
            wait_for(condition, what, seconds)
        except TimeoutError as error:
            logs = Submission.folder_of(self.path / output) / "logs"
            texts = [p.read_text(errors="replace")[-3000:] for p in sorted(logs.glob("*_log.out"))]
            pytest.fail("\n".join([str(error), *texts, self.cluster.logs()]))


@pytest.fixture(scope="module")
def desk(cluster, data, tmp_path_factory) -> Desk:  # noqa: F811
    path = tmp_path_factory.mktemp("desk")
    (path / "data").symlink_to(data)
    (path / "configs").symlink_to(ROOT / "configs")
    return Desk(cluster, path)


def curve(run: Path) -> list[tuple[str, int, dict[str, float]]]:
    """(stage, step, training losses) of every logged line, as they stand in the file."""
    if not (run / "metrics.jsonl").is_file():
        return []
    lines = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # being written
            line = json.loads(text)
            losses = {k: v for k, v in line.items() if k.startswith("train/")}
            if losses:
                lines.append((line["stage"], line["step"], losses))
    return lines


def _trains(pid: int) -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return any(w.endswith((b"launch/pretrain.py", b"launch/finetune.py")) for w in words)
    return False
