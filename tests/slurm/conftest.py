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

from crysforge.launch import submit
from crysforge.launch.cluster import status
from crysforge.launch.cluster.events import EventLog
from crysforge.launch.cluster.submission import Submission
from tests.distributed.conftest import write_data
from tests.distributed.ranks import ROOT
from tests.slurm.cluster import Cluster, missing, parent, wait_for

REQUIRED = "CRYSFORGE_REQUIRE_SLURM"
"""Environment variable that makes a missing Slurm an error."""

_SMALL = (
    "data=data",
    "trainer.log_every=1",
    "trainer.checkpoint_every=2",
    "trainer.deterministic=true",
    "loader.workers=0",
)

STEPS = 40
"""Of every run: enough to be met half-way on a machine that is slow to look."""

PRETRAIN = (
    *("job=pretrain", "--config", "configs/pretrain/tiny.yaml", *_SMALL),
    *("nodes=2", "stages=[vae]", f"vae.max_steps={STEPS}", "vae.batch_size=16"),
)

FINETUNE = (
    *("job=finetune", "--config", "configs/finetune/tiny.yaml", *_SMALL),
    *("target=ewald_energy", f"finetune.max_steps={STEPS}", "finetune.batch_size=16"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if missing() and not os.environ.get(REQUIRED):
        reason = f"no Slurm here ({', '.join(missing())}): apt-get install slurm-wlm munge"
        for item in items:
            if item.get_closest_marker("slurm"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    assert not missing(), f"{REQUIRED} is set, and there is no {', '.join(missing())}"
    with Cluster() as cluster:
        yield cluster


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """`contextlib.chdir`, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass
class Desk:
    """A user's desk on the login node: a working directory and the commands."""

    cluster: Cluster
    path: Path

    def submit(self, *args: str) -> str:
        """Output of `python launch/submit.py …`, run in this process."""
        printed = io.StringIO()
        with (
            mock.patch.dict(os.environ, self.cluster.environ),
            mock.patch.object(sys, "argv", ["submit.py", *args]),
            working_directory(self.path),
            contextlib.redirect_stdout(printed),
        ):
            submit.main()
        return printed.getvalue()

    def rows(self, output: str) -> dict[str, status.RunStatus]:
        """Status by run."""
        with mock.patch.dict(os.environ, self.cluster.environ):
            return {row.name: row for row in status.statuses(self.path / output)}

    def wait(self, output: str) -> dict[str, status.RunStatus]:
        """Status by run once Slurm has done with all of them."""

        def over() -> bool:
            left = self.cluster.run("squeue", "--noheader", "--format=%F").split()
            jobs = {self.job(output, name).split("_")[0] for name in rows}
            return not jobs & set(left)

        rows = self.rows(output)
        self.wait_until(over, f"all jobs of {output} have ended", output)
        return self.rows(output)

    def wait_for_step(self, output: str, step: int) -> None:
        """Returns when a run has logged so many steps."""
        run = self.path / output
        what = f"{output} is at step {step}"
        self.wait_until(lambda: len(curve(run)) >= step, what, output, pause=0.02)

    def wait_until(
        self, condition: Callable[[], bool], what: str, output: str, pause: float = 0.3
    ) -> None:
        """Returns when the condition holds; a failure shows the logs of a submission."""
        try:
            wait_for(condition, what, pause=pause)
        except TimeoutError as error:
            logs = Submission.folder_of(self.path / output).glob("logs/*_log.out")
            texts = [f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in sorted(logs)]
            pytest.fail("\n".join([str(error), *texts, self.cluster.logs()]))

    def events(self, output: str, name: str | None = None) -> list[str]:
        """What happened to a run."""
        folder = Submission.folder_of(self.path / output)
        return [e["event"] for e in EventLog(folder, name or Path(output).name).read()]

    def job(self, output: str, name: str | None = None) -> str:
        """Slurm's id of a run."""
        submission = Submission.find(self.path / output)
        assert submission is not None
        return submission.job_id(name or Path(output).name)[1]

    def processes(self, output: str, *scripts: bytes, job: str = "") -> list[int]:
        """Processes of a job that run one of the scripts; not their children that are about to run
        something else."""
        found = []
        for pid in self.cluster.processes(f"SLURM_JOB_ID={job or self.job(output)}"):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if any(word.endswith(scripts) for word in words):
                    found.append(pid)
        return [pid for pid in found if parent(pid) not in found]

    @contextlib.contextmanager
    def frozen(self, output: str, job: str = "") -> Iterator[list[int]]:
        """Holds all processes that train a run in mid-step for as long as the block lasts, so that
        what happens meanwhile does not depend on the machine's speed."""
        found = self.processes(output, b"launch/pretrain.py", b"launch/finetune.py", job=job)
        assert found, f"{output} has no process that trains"
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield found
        finally:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "prototypes")


@pytest.fixture(scope="module")
def desk(cluster, data, tmp_path_factory) -> Desk:
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


def board(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Losses by name as TensorBoard shows them: (step, value) in the order of the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = {}
    for stage in sorted((run / "tensorboard").iterdir()):
        shown = EventAccumulator(str(stage)).Reload()
        for tag in shown.Tags()["scalars"]:
            if tag.startswith(("train/", "val/")):
                points = [(e.step, e.value) for e in shown.Scalars(tag)]
                losses[f"{stage.name}/{tag}"] = points
    return losses
