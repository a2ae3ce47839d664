"""Local runs: stops, crashes, failures, cancellation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from crysforge.datapipe.common.config import configure
from crysforge.launch.cluster import status
from crysforge.launch.cluster.code import ROOT
from crysforge.launch.cluster.config import SubmitConfig
from crysforge.launch.cluster.events import EventLog, ends_of_attempt
from crysforge.launch.cluster.executors import run_here, run_local
from crysforge.launch.cluster.submission import Submission, new_entry
from crysforge.launch.cluster.worker import Task
from crysforge.trainer.base.signals import REQUEUE
from tests.families import left_of, orphans, until

SCRIPT = """
import json, pathlib, sys, os, signal, time
run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True)
attempts = run / "attempts"
n = len(attempts.read_text()) if attempts.exists() else 0
attempts.write_text("x" * (n + 1))
(run / "processes").write_text(os.environ["CRYSFORGE_PROCESSES"])
behaviour = json.loads(sys.argv[2])
what = behaviour[min(n, len(behaviour) - 1)]
if what == "progress":
    (run / "checkpoints" / f"vae-{n:08d}").mkdir(parents=True)
    (run / "checkpoints" / f"vae-{n:08d}" / "COMPLETE").touch()
    what = 1
if what == 0:
    (run / "run.json").write_text('{"identity": {"stages": ["vae"]}, "finished": ["vae"]}')
if what == "cancelled":
    folder = pathlib.Path(str(run.parent) + ".submit")
    log = folder / "events" / "hopeless.jsonl"
    while not log.exists() or log.read_text().count('"crashed"') < 3:
        time.sleep(0.05)  # what still runs would be cancelled, too
    (folder / "cancelled").touch()
    what = 75
print("error: as planned", file=sys.stderr)
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (run / "waiting").touch()
    signal.pause()
sys.exit(what)
"""


def local(tmp_path: Path, behaviours: dict[str, list], **settings) -> tuple[Submission, list[str]]:
    """Carries out runs whose attempts end as given, on this machine; returns those that failed."""
    config = configure(SubmitConfig, {"job": "pretrain", "cluster": "local", **settings})
    (tmp_path / "script.py").write_text(SCRIPT)
    submission = Submission(Submission.folder_of(tmp_path / "runs"), "pretrain")
    tasks = []
    for name, behaviour in behaviours.items():
        output = tmp_path / "runs" / name
        submission.add(name, str(output), {"x": name}, {})
        argv = (str(tmp_path / "script.py"), str(output), json.dumps(behaviour))
        limits = config.max_requeues, config.max_crashes
        tasks.append(Task(name, argv, str(submission.folder), str(output), *limits))
    submission.history.append(new_entry("local", ROOT, {}))
    ids = submission.history[-1]["ids"]
    failed = run_local(config, tasks, submission.folder, ROOT, ids.__setitem__)
    submission.write()
    return submission, failed


def test_local_cells_stop_crash_fail_and_finish(tmp_path):
    submission, failed = local(
        tmp_path,
        {
            "good": [0],
            "stopped": [75, 75, 0],
            "crashing": [1, 1, 0],
            "hopeless": [1],
            "wrong": [2],
            "cancelled": ["cancelled"],
        },
        max_crashes=2,
        array_parallelism=2,
    )
    # A cancelled submission starts no more runs and no more attempts; it was the last one.
    assert set(failed) == {"hopeless", "wrong", "cancelled"}
    attempts = {c: len((tmp_path / "runs" / c / "attempts").read_text()) for c in submission.runs}
    assert attempts == {
        "good": 1,
        "stopped": 3,
        "crashing": 3,
        "hopeless": 3,
        "wrong": 1,
        "cancelled": 1,
    }
    at_once = {(tmp_path / "runs" / c / "processes").read_text() for c in submission.runs}
    assert at_once == {"2"} and "CRYSFORGE_PROCESSES" not in os.environ
    rows = {r.name: r for r in status.statuses(tmp_path / "runs")}
    assert {c: r.state for c, r in rows.items()} == {
        "good": "finished",
        "stopped": "finished",
        "crashing": "finished",
        "hopeless": "crashed",
        "wrong": "failed",
        "cancelled": "cancelled",
    }
    assert rows["stopped"].retries == "2"
    assert rows["wrong"].reason == "error: as planned"
    text = status.table(list(rows.values()))
    assert "wrong: error: as planned" in text and "3 finished" in text


def test_crashes_with_progress_in_between_are_no_loop(tmp_path):
    _, failed = local(tmp_path, {"a": ["progress"] * 3 + [0]}, max_crashes=0)
    assert not failed


def test_turns_are_limited(tmp_path):
    submission, failed = local(tmp_path, {"a": [75]}, max_requeues=2)
    assert failed == ["a"]
    assert len((tmp_path / "runs/a/attempts").read_text()) == 3
    assert EventLog(submission.folder, "a").read()[-1]["event"] == "gave up"
    assert status.statuses(tmp_path / "runs")[0].state == "failed"


def test_attempts_without_progress_are_not_repeated(tmp_path):
    _, failed = local(tmp_path, {"a": [75]}, time="1")
    assert failed == ["a"]
    assert len((tmp_path / "runs/a/attempts").read_text()) == 2
    row = status.statuses(tmp_path / "runs")[0]
    assert row.state == "failed" and "twice its time was up before it got" in row.reason


def test_local_cells_may_stop_more_often_than_submitit_restarts_them(tmp_path):
    _, failed = local(tmp_path, {"a": [75] * 6 + [0]})
    assert not failed
    assert len((tmp_path / "runs/a/attempts").read_text()) == 7
    assert status.statuses(tmp_path / "runs")[0].retries == "6"


def two_processes(tmp_path: Path, code: str) -> list[str]:
    """Runs a script in both processes of a local run."""
    config = configure(SubmitConfig, {"job": "pretrain", "cluster": "local", "tasks_per_node": 2})
    (tmp_path / "script.py").write_text(code)
    argv = (str(tmp_path / "script.py"), str(tmp_path / "rank"))
    one = Task("a", argv, str(tmp_path / "f"), str(tmp_path / "out"), 9, 9)
    return run_local(config, [one], tmp_path / "f", ROOT, lambda *_: None)


def test_processes_of_a_cell_know_each_other(tmp_path):
    code = "import os, sys; open(f'{sys.argv[1]}-{os.environ[\"RANK\"]}', 'w').write(' '.join("
    code += "os.environ[k] for k in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"
    assert two_processes(tmp_path, code) == []
    first, second = ((tmp_path / f"rank-{r}").read_text() for r in (0, 1))
    assert first == second and first.startswith("2 127.0.0.1 ")


def test_the_process_that_knows_what_is_wrong_is_heard(tmp_path):
    """Rank 0 only lost the other, which says why a little later: nobody starts the run again."""
    log = EventLog(tmp_path / "f", "a", 0).path
    code = "import os, pathlib, sys, time; rank = int(os.environ['RANK'])\n"
    code += f"log = pathlib.Path({str(log)!r})\n"
    code += "while rank and not (log.exists() and 'crashed' in log.read_text()):\n"
    code += "    time.sleep(0.05)\nsys.exit(1 + rank)"
    assert two_processes(tmp_path, code) == ["a"]
    start, end = EventLog(tmp_path / "f", "a").read()
    assert (start["event"], end["event"], end["rank"], end["code"]) == ("start", "failed", 1, 2)
    ends = ends_of_attempt(tmp_path / "f", "a", start["job"], 0)
    assert [(e["rank"], e["event"]) for e in ends] == [(0, "crashed"), (1, "failed")]


def test_cancel_ends_local_cells(tmp_path):
    """From another process, as a user would: the run is stopped in order, waiting runs do not
    start."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.launch.cluster.test_submit_local import local\n"
        "local(Path(sys.argv[1]), {'a': ['wait'], 'b': [0]})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        while not (tmp_path / "runs/a/waiting").exists():
            assert process.poll() is None
        submission = Submission(Submission.folder_of(tmp_path / "runs"), "pretrain")
        events = EventLog(submission.folder, "a").read()
        for name in ("a", "b"):
            submission.add(name, str(tmp_path / "runs" / name), {}, {})
        submission.history.append(new_entry("local", ROOT, {"a": events[0]["job"]}))
        submission.write()
        assert status.statuses(tmp_path / "runs")[0].state == "running"
        assert status.cancel(tmp_path / "runs") == 1
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert [e["event"] for e in EventLog(submission.folder, "a").read()] == ["start", "stopped"]
    assert not (tmp_path / "runs/b").exists()
    assert {r.state for r in status.statuses(tmp_path / "runs")} == {"cancelled"}


def test_debug_runs_here_and_goes_on_after_a_failure(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys\nassert sys.argv[1] != 'raise', 'a bug'\nsys.exit(int(sys.argv[1]))"
    )
    tasks = [
        Task(c, (str(tmp_path / "script.py"), c), str(tmp_path), "", 0, 0)
        for c in ("raise", "2", "0")
    ]
    assert run_here(tasks, tmp_path) == ["raise", "2"]


# When those that carry runs out are killed


@contextmanager
def supervised(tmp_path):
    """A process whose run does not heed SIGINT and is told by SIGTERM to save."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from crysforge.trainer.base.script import run\n"
        "from tests.launch.cluster.test_submit_local import local\n"
        "run(lambda: local(Path(sys.argv[1]), {'a': ['wait']}))"
    )
    process = psutil.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        until((tmp_path / "runs/a/waiting").exists, "it runs")
        yield process
    finally:
        if process.is_running():
            left_of([*process.children(recursive=True), process], bound=0)
        process.wait()


@pytest.mark.parametrize("generation", range(3), ids=["submit", "controller", "task"])
def test_cells_do_not_outlive_those_that_run_them(tmp_path, generation):
    """`submit` starts submitit's controller, that one a task, and that one the script."""
    with supervised(tmp_path) as process:
        line = [process]
        while line[-1].children():
            (child,) = line[-1].children()
            line.append(child)
        assert len(line) == 4
        assert orphans(line[generation]) == []


def test_submit_that_is_asked_to_end_lets_its_cells_save(tmp_path):
    with supervised(tmp_path) as process:
        family = process.children(recursive=True)
        process.terminate()
        assert process.wait(60) == REQUEUE
        assert left_of(family) == []
    folder = Submission.folder_of(tmp_path / "runs")
    assert [e["event"] for e in EventLog(folder, "a").read()] == ["start", "stopped"]
    assert len((tmp_path / "runs/a/attempts").read_text()) == 1
