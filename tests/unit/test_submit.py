"""Submitting jobs without a cluster: what is asked for is checked, quoted, recorded, and survives
stops, crashes and cancellation in local processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import string
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import events, request, status, submit
from launch.cluster import (
    SubmitConfig,
    minutes,
    run_here,
    run_local,
    script,
    slurm_executor,
)
from launch.events import EventLog, outcome_of
from launch.request import JOBS, Request
from launch.submission import ROOT, Submission, code_files, new_attempt
from launch.sweep import grid, merge, names, read_sweep
from launch.task import Task, progress, rank_environ, run_to_end
from models.registry import configure

FINETUNE = ("job=finetune", "data=D", "target=gap", "encoder={name: pddformer, tiny: true}")


def ask(*argv: str) -> Request:
    return Request.parse(argv, "help")


# --- what is asked for ---------------------------------------------------------------------------


def test_settings_of_submit_and_of_the_jobs_do_not_overlap():
    """So that nobody has to say whose a setting is."""
    own = {f.name for f in fields(SubmitConfig)} | {"site"}
    for name, job in JOBS.items():
        theirs = {f.name for f in fields(job.schema())}
        assert own & theirs <= {"dry_run"}, name


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["job=finetun"], ["'finetun'", "'finetune'"]),
        ([*FINETUNE, "run_dir=r", "partion=gpu"], ["'partion'", "'partition'"]),
        ([*FINETUNE, "run_dir=r", "lable_fraction=1"], ["'lable_fraction'", "'label_fraction'"]),
        ([*FINETUNE, "run_dir=r", "finetune.epoch=1"], ["'finetune.epoch'", "'epochs'"]),
        ([*FINETUNE, "run_dir=r", "encoder.widht=8"], ["encoder.widht", "'width'"]),
        ([*FINETUNE, "run_dir=r", "label_fraction=2"], ["label_fraction", "(0, 1]"]),
        ([*FINETUNE, "run_dir=r", "sweep=[sed=[1]]"], ["'sed'", "'seed'"]),
        ([*FINETUNE, "run_dir=r", "sweep=[finetune.lrr=[1]]"], ["'finetune.lrr'", "'lr'"]),
        ([*FINETUNE], ["'run_dir' is required"]),
        (["job=finetune", "run_dir=r"], ["'data' is required"]),
        ([*FINETUNE, "run_dir=r", "gpus=2"], ["finetune runs in one process, not 2"]),
        ([*FINETUNE, "run_dir=r", "nodes=2"], ["finetune runs in one process, not 2"]),
        (["job=pretrain", "data=D", "run_dir=r", "stages=[vea]"], ["'vea'", "'vae'"]),
        (["job=pretrain", "gpus=4", "tasks_per_node=2"], ["every process takes one GPU"]),
        (["job=pretrain", "nodes=0"], ["nodes", "at least 1"]),
        (["job=pretrain", "nodes=two"], ["nodes", "two"]),
        (["job=pretrain", "cluster=local", "nodes=2"], ["one node"]),
        (["job=pretrain", "cluster=slrum"], ["'slrum'", "'slurm'"]),
        (["job=pretrain", "time=tomorrow"], ["'tomorrow'", "12:00:00"]),
        (["job=pretrain", "slurm.nodes=3"], ["slurm.nodes", "use nodes"]),
        (["job=pretrain", "slurm.output=f"], ["slurm.output", "submit sets it itself"]),
        (["job=pretrain", "slurm.--exclusive=true"], ["without the dashes"]),
        (["job=pretrain", "slurm.comment=a\nrm -rf ~"], ["slurm.comment", "cannot be printed"]),
        (["job=pretrain", "account=a\nrm -rf ~"], ["account", "cannot be printed"]),
        (["data=D"], ["give one of job=NAME"]),
        (["status=a", "cancel=b"], ["give one of job=NAME"]),
        (["status=a", "data=D"], ["takes no other settings"]),
        (["site=nowhere.yaml", "job=pretrain"], ["nowhere.yaml"]),
    ],
)
def test_mistakes_are_named_before_anything_is_submitted(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        ask(*argv).cells()
    assert all(w in str(error.value) for w in words), str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_site_file_means_what_it_says(tmp_path):
    """`12:00:00` and `007` in YAML are numbers to others."""
    site = tmp_path / "site.yaml"
    site.write_text(
        "time: 12:00:00\naccount: 007\ncpus: 4\nslurm: {reservation: 0x10, hold: true}\n"
    )
    config = ask("job=pretrain", f"site={site}", "cpus=8", "slurm.hold=false").config
    assert (config.time, config.account, config.cpus) == ("12:00:00", "007", 8)
    assert config.slurm == {"reservation": "0x10", "hold": "false"}
    site.write_text("partion: gpu\n")
    with pytest.raises(ValueError, match=r"'partion'.*'partition'"):
        ask("job=pretrain", f"site={site}")


def test_shipped_site_files_are_valid():
    files = sorted((ROOT / "configs" / "submit").glob("*.yaml"))
    assert files
    for file in files:
        ask("job=pretrain", f"site={file}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90:30", 91),
        ("12:00:00", 720),
        ("2-00", 2880),
        ("2-01:30", 2970),
        ("1-00:00:01", 1441),
    ],
)
def test_time_limits_are_sbatch_s(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "1h", "-5", "1:2:3:4", "0:00:00"])
def test_what_is_no_time_limit(text):
    with pytest.raises(ValueError, match="time="):
        minutes(text)


# --- sweeps --------------------------------------------------------------------------------------


def test_grid_on_the_command_line():
    cells = read_sweep("[target=[a,b],finetune.lr=[1e-3,2],name=['x,y']]")
    assert len(cells) == 4
    assert cells[0] == {"target": "a", "finetune.lr": 0.001, "name": "x,y"}
    assert cells[3] == {"target": "b", "finetune.lr": 2, "name": "x,y"}


def test_sweep_files(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("seed: [0, 1]\nfinetune.lr: [0.1]\n")
    assert read_sweep(str(path)) == [
        {"seed": 0, "finetune.lr": 0.1},
        {"seed": 1, "finetune.lr": 0.1},
    ]
    path.write_text("- {seed: 0, finetune: {lr: 0.1, epochs: 2}}\n- {target: b}\n")
    assert read_sweep(str(path)) == [
        {"seed": 0, "finetune.lr": 0.1, "finetune.epochs": 2},
        {"target": "b"},
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[seed=[0,0]]", "twice"),
        ("[seed=1]", "needs a list"),
        ("[seed=[]]", "needs a list"),
        ("[seed]", "not of the form"),
        ("[seed=[0,1]", "closing bracket|no list"),
        ("[seed=[0],seed=[1]]", "twice"),
        ("[]", "no cell"),
        ("sweep.yaml", "neither a grid"),
    ],
)
def test_sweeps_that_mean_nothing(text, words):
    with pytest.raises(ValueError, match=words):
        read_sweep(text)


values = st.one_of(
    st.integers(), st.booleans(), st.none(), st.text(max_size=200), st.lists(st.text(max_size=9))
)


@given(st.lists(st.dictionaries(st.text(max_size=20), values, min_size=1), min_size=1, max_size=8))
def test_names_of_cells_are_different_safe_file_names(cells):
    cells = [json.loads(c) for c in dict.fromkeys(json.dumps(c, sort_keys=True) for c in cells)]
    found = names(cells)
    assert len(set(found)) == len(cells)
    for name in found:
        assert 0 < len(name) <= 130
        assert not set(name) - set(string.ascii_letters + string.digits + "._+-,=")


def test_names_say_what_was_swept_and_a_sweep_can_grow():
    small = names(grid({"target": ["e_form", "gap"], "seed": [0]}))
    assert small == ["target=e_form,seed=0", "target=gap,seed=0"]
    assert set(small) < set(names(grid({"target": ["e_form", "gap"], "seed": [0, -1]})))
    assert names([{"data": "/a/b/perov5/"}]) == ["data=perov5"]


def test_cells_change_only_what_they_name():
    base = {"finetune": {"lr": 1.0, "epochs": 3}, "seed": 0}
    cell = merge(base, {"finetune.lr": 2.0, "label_fraction": 0.2})
    assert cell == {"finetune": {"lr": 2.0, "epochs": 3}, "seed": 0, "label_fraction": 0.2}
    assert base["finetune"]["lr"] == 1.0


def test_every_cell_has_an_output_of_its_own(tmp_path):
    cells = ask(*FINETUNE, "run_dir=runs/s", "sweep=[seed=[0,1],label_fraction=[0.2,1.0]]").cells()
    assert [c.output for c in cells] == [
        f"runs/s/seed={s},label_fraction={f}" for s in (0, 1) for f in (0.2, 1.0)
    ]
    assert all(c.config["run_dir"] == c.output and c.config["target"] == "gap" for c in cells)
    cells = ask(
        "job=predict", "checkpoint=C", "output=p/all.csv", "input=x", "sweep=[input=[a.csv,b.csv]]"
    ).cells()
    assert [c.output for c in cells] == ["p/all/input=a.csv.csv", "p/all/input=b.csv.csv"]
    path = tmp_path / "s.yaml"
    path.write_text("- {seed: 0, run_dir: r}\n- {seed: 1, run_dir: r}\n")
    with pytest.raises(ValueError, match="several cells of the sweep write r"):
        ask(*FINETUNE, "run_dir=runs/s", f"sweep={path}").cells()


# --- the sbatch script ---------------------------------------------------------------------------

HOSTILE = 'a\'b "c" $(touch pwned) `touch pwned`; touch pwned # \\'


def test_script_says_what_was_asked():
    config = ask(
        *("job=pretrain", "nodes=2", "gpus=4", "cpus=8", "mem=64G", "time=1-12", "partition=p"),
        *(
            "account=a",
            "constraint=h100",
            "qos=high",
            "slurm.reservation=r",
            "slurm.exclusive=true",
        ),
        "array_parallelism=3",
    ).config
    executor = slurm_executor(config, "run", Path("/f.submit"), Path("/f.submit/code-1"))
    lines = script(executor, 7).splitlines()
    for option in (
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "cpus-per-task=8",
        "mem=64G",
        "time=2160",
        "partition=p",
        "account=a",
        "constraint=h100",
        "qos=high",
        "reservation=r",
        "exclusive",
        "requeue",
        "array=0-6%3",
        "job-name=run",
    ):
        assert f"#SBATCH --{option}" in lines
    srun = next(x for x in lines if x.startswith("srun"))
    assert "--kill-on-bad-exit=1" in srun and "--cpus-per-task=8" in srun


def test_script_leaves_out_what_was_not_asked():
    """So that the site's defaults hold: no partition, no time limit, no wckey."""
    text = script(slurm_executor(ask("job=pretrain").config, "r", Path("/f"), Path("/c")), 1)
    for option in ("time", "partition", "account", "wckey", "mem", "gpus", "array", "constraint"):
        assert f"--{option}" not in text


def test_nothing_that_users_write_is_run_by_the_script(tmp_path):
    """The script is run by a real shell in which srun only shows its arguments."""
    folder = tmp_path / HOSTILE.replace("/", "")
    config = ask(
        "job=pretrain", f"name={HOSTILE}", f"account={HOSTILE}", f"slurm.comment={HOSTILE}"
    ).config
    text = script(slurm_executor(config, "run", folder, folder / "code-1"), 1)
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.splitlines()[0] == str(folder / "code-1")
    assert done.stdout.splitlines()[-1] == str(folder / "logs")
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("name", ["a%jb", "a\nb"])
def test_paths_that_slurm_would_read_otherwise_are_refused(name):
    with pytest.raises(ValueError, match=r"a%jb|cannot be printed"):
        slurm_executor(ask("job=pretrain").config, "r", Path("/") / name, Path("/c"))


# --- what runs on a node -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (0, "finished"),
        (75, "stopped"),
        (-signal.SIGTERM, "stopped"),
        (-signal.SIGUSR2, "stopped"),
        (2, "failed"),
        (1, "crashed"),
        (-signal.SIGKILL, "crashed"),
        (-signal.SIGSEGV, "crashed"),
    ],
)
def test_outcomes(code, outcome):
    assert outcome_of(code) == outcome


def test_codes_are_those_of_the_jobs():
    from trainer.signals import REQUEUE

    assert events.REQUEUE == REQUEUE


def test_what_runs_on_a_node_imports_nothing_heavy():
    """Every process of a job loads it before the job itself."""
    code = "import sys, launch.task; sys.exit(bool({'torch', 'omegaconf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_signals_reach_the_script():
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\n"
        "os.kill(os.getppid(), signal.SIGUSR2)\n"
        "signal.pause()\n"
    )
    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        assert run_to_end([sys.executable, "-c", code], os.environ) == 75
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def environment(rank: int, size: int, nodes: int, job: str = "12") -> SimpleNamespace:
    return SimpleNamespace(
        raw_job_id=job,
        global_rank=rank,
        local_rank=rank % (size // nodes),
        num_tasks=size,
        num_nodes=nodes,
        hostnames=[f"127.0.0.{i + 1}" for i in range(nodes)],
    )


def test_ranks_meet_at_one_address():
    environs = [rank_environ(environment(r, 4, 2)) for r in range(4)]
    assert [e["RANK"] for e in environs] == ["0", "1", "2", "3"]
    assert [e["LOCAL_RANK"] for e in environs] == ["0", "1", "0", "1"]
    assert {e["WORLD_SIZE"] for e in environs} == {"4"}
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in environs} == {
        ("127.0.0.1", environs[0]["MASTER_PORT"])
    }


def test_neighbouring_jobs_and_turns_meet_at_other_ports(monkeypatch):
    ports = set()
    for turn in range(5):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(turn))
        environs = [rank_environ(environment(0, 1, 1, str(job))) for job in range(100, 400)]
        ports |= {e["MASTER_PORT"] for e in environs}
    assert len(ports) == 5 * 300
    assert all(20000 <= int(p) < 30000 for p in ports)  # below what systems hand out by themselves


def test_progress_is_what_is_complete(tmp_path):
    assert progress(str(tmp_path)) == ""
    (tmp_path / "run.json").write_text('{"finished": ["vae"]}')
    for name in ("joint-00000010", "joint-00000020"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/joint-00000010/COMPLETE").touch()
    assert progress(str(tmp_path)) == "vae,joint-00000010"


def test_crashes_count_where_nothing_was_gained(tmp_path):
    log = EventLog(tmp_path, "cell")
    log.note("start", job="1", progress="a")
    assert log.crashes("a") == 1
    assert log.crashes("b") == 0  # it came further before it crashed
    log.note("crashed", job="1")
    log.note("start", job="1", progress="a")  # the machine went away: no word of the end
    log.note("start", job="1", progress="a")
    assert log.crashes("a") == 3
    log.note("stopped", job="1")
    log.note("start", job="1", progress="a")
    assert log.crashes("a") == 1


def test_events_survive_a_cut_line(tmp_path):
    log = EventLog(tmp_path, "cell")
    log.note("start", job="1")
    with open(log.path, "a") as file:
        file.write('{"event": "fini')
    assert [e["event"] for e in log.read()] == ["start"]


# --- local processes -----------------------------------------------------------------------------

SCRIPT = """
import json, pathlib, sys, os, signal
run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True)
turns = run / "turns"
n = len(turns.read_text()) if turns.exists() else 0
turns.write_text("x" * (n + 1))
behaviour = json.loads(sys.argv[2])
what = behaviour[min(n, len(behaviour) - 1)]
if what == "progress":
    (run / "checkpoints" / f"vae-{n:08d}").mkdir(parents=True)
    (run / "checkpoints" / f"vae-{n:08d}" / "COMPLETE").touch()
    what = 1
if what == 0:
    (run / "run.json").write_text('{"identity": {"stages": ["vae"]}, "finished": ["vae"]}')
if what == "cancelled":
    pathlib.Path(str(run.parent) + ".submit", "cancelled").touch()
    what = 75
print("error: as planned", file=sys.stderr)
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (run / "waiting").touch()
    signal.pause()
sys.exit(what)
"""


def local(tmp_path: Path, behaviours: dict[str, list], **settings) -> tuple[Submission, list[str]]:
    """Runs cells whose turns end as given, on this machine; returns those that failed."""
    config = configure(SubmitConfig, {"job": "pretrain", "cluster": "local", **settings})
    (tmp_path / "script.py").write_text(SCRIPT)
    submission = Submission(Submission.folder_of(tmp_path / "runs"), "pretrain")
    tasks = []
    for cell, behaviour in behaviours.items():
        output = tmp_path / "runs" / cell
        submission.add(cell, str(output), {"x": cell}, {})
        argv = (str(tmp_path / "script.py"), str(output), json.dumps(behaviour))
        limits = config.max_requeues, config.max_crashes
        tasks.append(Task(cell, argv, str(submission.folder), str(output), *limits))
    submission.attempts.append(new_attempt("local", ROOT, {}))
    ids = submission.attempts[-1]["ids"]
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
    # A cancelled submission starts no more cells and no more turns; it was the last one.
    assert failed == ["hopeless", "wrong", "cancelled"] or set(failed) == {
        "hopeless",
        "wrong",
        "cancelled",
    }
    turns = {c: len((tmp_path / "runs" / c / "turns").read_text()) for c in submission.cells}
    assert turns == {
        "good": 1,
        "stopped": 3,
        "crashing": 3,
        "hopeless": 3,
        "wrong": 1,
        "cancelled": 1,
    }
    rows = {r.cell: r for r in status.statuses(tmp_path / "runs")}
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
    assert len((tmp_path / "runs/a/turns").read_text()) == 3
    assert EventLog(submission.folder, "a").read()[-1]["event"] == "gave up"
    assert status.statuses(tmp_path / "runs")[0].state == "failed"


def test_processes_of_a_cell_know_each_other(tmp_path):
    config = configure(SubmitConfig, {"job": "pretrain", "cluster": "local", "tasks_per_node": 2})
    code = "import os, sys; open(f'{sys.argv[1]}-{os.environ[\"RANK\"]}', 'w').write(' '.join("
    code += "os.environ[k] for k in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"
    (tmp_path / "script.py").write_text(code)
    argv = (str(tmp_path / "script.py"), str(tmp_path / "rank"))
    one = Task("a", argv, str(tmp_path / "f"), str(tmp_path / "out"), 0, 0)
    assert run_local(config, [one], tmp_path / "f", ROOT, lambda *_: None) == []
    first, second = ((tmp_path / f"rank-{r}").read_text() for r in (0, 1))
    assert first == second and first.startswith("2 127.0.0.1 ")


def test_cancel_ends_local_cells(tmp_path):
    """From another process, as a user would: the run is stopped in order, waiting cells do not
    start."""
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_submit import local\n"
        "local(Path(sys.argv[1]), {'a': ['wait'], 'b': [0]})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        while not (tmp_path / "runs/a/waiting").exists():
            assert process.poll() is None
        submission = Submission(Submission.folder_of(tmp_path / "runs"), "pretrain")
        events = EventLog(submission.folder, "a").read()
        for cell in ("a", "b"):
            submission.add(cell, str(tmp_path / "runs" / cell), {}, {})
        submission.attempts.append(new_attempt("local", ROOT, {"a": events[0]["job"]}))
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


# --- the record of a submission ------------------------------------------------------------------


def submitted(tmp_path: Path, cells: dict[str, str], cluster: str = "slurm") -> Submission:
    submission = Submission(Submission.folder_of(tmp_path / "runs"), "finetune")
    for cell in cells:
        submission.add(cell, str(tmp_path / "runs" / cell), {"seed": cell}, {"seed": 0})
    submission.attempts.append(new_attempt(cluster, ROOT, cells))
    submission.write()
    return submission


def test_record_is_found_and_moves_with_its_runs(tmp_path):
    written = submitted(tmp_path / "here", {"a": "1_0", "b": "1_1"})
    assert Submission.find(tmp_path / "here/runs") == written
    assert Submission.find(tmp_path / "here/runs.submit") == written
    (tmp_path / "here").rename(tmp_path / "there")
    moved = Submission.find(tmp_path / "there/runs")
    assert moved is not None and moved.output("a") == tmp_path / "there/runs/a"
    assert Submission.find(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', '{"schema": 1}'])
def test_a_broken_record_is_named(tmp_path, text):
    submission = submitted(tmp_path, {"a": "1"})
    (submission.folder / "submission.json").write_text(text)
    with pytest.raises(ValueError, match=r"submission\.json"):
        Submission.find(tmp_path / "runs")


@pytest.mark.parametrize(
    ("slurm", "events", "state"),
    [
        ("PENDING", [], "pending"),
        ("RUNNING", ["start"], "running"),
        ("PENDING", ["start", "stopped", "requeue"], "pending"),
        ("FAILED", ["start", "failed"], "failed"),
        ("FAILED", ["start", "crashed"], "crashed"),
        ("CANCELLED", ["start"], "cancelled"),
        ("CANCELLED", [], "cancelled"),
        ("TIMEOUT", ["start"], "timeout"),
        ("OUT_OF_MEMORY", ["start"], "out of memory"),
        ("", ["start", "failed"], "failed"),
        ("", ["start", "stopped"], "stopped"),
        ("", ["start"], "lost"),
        ("", [], "lost"),
        (None, ["start"], "unknown"),
        (None, ["start", "failed"], "failed"),
    ],
)
def test_states(tmp_path, monkeypatch, slurm, events, state):
    """By what Slurm knows ("": it has forgotten; None: it cannot be asked) and what was noted."""
    submission = submitted(tmp_path, {"a": "1"})
    known = None if slurm is None else {"1": (slurm, "node1")} if slurm else {}
    monkeypatch.setattr(status, "slurm_states", lambda ids: known)
    for event in events:
        EventLog(submission.folder, "a").note(event, job="1", node="node1", progress="")
    row = status.statuses(tmp_path / "runs")[0]
    assert row.state == state
    assert row.active == (state in ("pending", "running", "unknown"))


def finish(run: Path, mae: float) -> None:
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"identity": {}, "finished": ["finetune"]}')
    line = {"stage": "finetune", "step": 7, "train/loss": 0.5, "val/loss": 0.4, "val/mae/gap": 0.3}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    metrics = {"units": {"gap": "eV"}, "test": {"mae": mae, "n": 3}, "targets": ["gap"]}
    (run / "metrics.json").write_text(json.dumps(metrics))


def test_table_and_results_after_the_fact(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "slurm_states", lambda ids: {})
    submitted(tmp_path, {"a": "1_0", "b": "1_1"})
    finish(tmp_path / "runs/a", 0.25)
    rows = {r.cell: r for r in status.statuses(tmp_path / "runs")}
    assert (rows["a"].state, rows["a"].step, rows["a"].value) == (
        "finished",
        "finetune 7",
        "test MAE 0.25 eV",
    )
    path, count, done = status.collect(tmp_path / "runs")
    assert (count, done) == (2, 1)
    with open(path, newline="") as file:
        table = {r["cell"]: r for r in csv.DictReader(file)}
    assert (table["a"]["test.mae"], table["a"]["seed"], table["a"]["targets"]) == (
        "0.25",
        "a",
        "gap",
    )
    assert (table["b"]["test.mae"], table["b"]["state"]) == ("", "lost")


def test_status_and_collect_work_on_runs_that_were_not_submitted(tmp_path):
    finish(tmp_path / "runs/a", 0.25)
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/b/run.json").write_text('{"identity": {"stages": ["vae"]}, "finished": []}')
    rows = {r.cell: r.state for r in status.statuses(tmp_path / "runs")}
    assert rows == {"a": "finished", "b": "unfinished"}
    assert status.collect(tmp_path / "runs")[1:] == (2, 1)
    with pytest.raises(ValueError, match="nowhere"):
        status.statuses(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="was not submitted"):
        status.cancel(tmp_path / "runs")


def test_running_value_is_of_the_newest_stage(tmp_path):
    lines = [
        {"stage": "vae", "step": 9, "val/loss": 1.0},
        {"stage": "joint", "step": 2, "train/loss": 5.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert status.last_logged(tmp_path) == ("joint 2", "loss 5")


def test_what_has_finished_or_still_runs_is_not_submitted_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = {"1_1": ("RUNNING", "n"), "1_2": ("FAILED", "n")}
    monkeypatch.setattr(status, "slurm_states", lambda ids: known)
    submitted(tmp_path, {"seed=0": "1_0", "seed=1": "1_1", "seed=2": "1_2"})
    finish(tmp_path / "runs/seed=0", 0.25)
    asked = ask(*FINETUNE, "run_dir=runs", "sweep=[seed=[0,1,2,3]]")
    left = asked.left(asked.submission(), asked.cells())
    assert [cell.name for cell in left] == ["seed=2", "seed=3"]
    assert "seed=0: finished already" in capsys.readouterr().out
    monkeypatch.setattr(status, "slurm_states", lambda ids: None)
    with pytest.raises(ValueError, match="squeue does not answer"):
        asked.left(asked.submission(), asked.cells())
    with pytest.raises(ValueError, match="is of a finetune job"):
        ask("job=pretrain", "data=D", "run_dir=runs").submission()


def test_dry_run_shows_the_script_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["submit", *FINETUNE, "run_dir=r/s", "sweep=[seed=[0,1]]", "--dry-run"]
    )
    submit.main()
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-1%2" in out and "# seed=1: finetune → r/s/seed=1" in out
    assert not list(tmp_path.iterdir())


def test_snapshot_is_the_code_as_it_is(tmp_path, monkeypatch):
    """Edited and new files are in it, ignored and deleted ones are not; later edits are not."""
    root = tmp_path / "repository"
    for name in ("launch/a.py", "launch/b.py", "docs/c.md", ".gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("*.pyc\nruns/\n")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    (root / "launch/a.py").write_text("edited")
    (root / "launch/b.py").unlink()
    (root / "launch/new.py").write_text("new")
    (root / "launch/x.pyc").write_text("ignored")
    (root / "scratch.txt").write_text("outside of the packages")
    monkeypatch.setattr("launch.submission.ROOT", root)
    code = Submission(tmp_path / "f").snapshot()
    (root / "launch/a.py").write_text("edited later")
    found = {str(p.relative_to(code)) for p in code.rglob("*") if p.is_file()}
    assert found == {"launch/a.py", "launch/new.py", "docs/c.md", ".gitignore"}
    assert (code / "launch/a.py").read_text() == "edited"


def test_snapshot_without_git_holds_the_packages():
    """An installation has no repository around it."""
    names = code_files(ROOT / "tests")  # not the top of a repository, and without packages
    assert names == []
    assert "launch/submit.py" in code_files(ROOT)


def test_request_help_lists_everything(capsys):
    for argv in ([], ["--help"]):
        with pytest.raises(SystemExit):
            ask(*argv)
    assert "array_parallelism" in capsys.readouterr().out
    assert request.JOBS.keys() == {"pretrain", "finetune", "prepare", "predict"}
