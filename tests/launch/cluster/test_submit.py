"""Submitting jobs without a cluster: what is asked for is checked and quoted."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crysforge.launch import submit
from crysforge.launch.cluster.code import ROOT
from crysforge.launch.cluster.config import SubmitConfig, minutes
from crysforge.launch.cluster.executors import script, slurm_executor
from crysforge.launch.cluster.planning import request
from crysforge.launch.cluster.planning.request import JOBS, Request
from crysforge.launch.cluster.planning.sweep import grid, merge, names, read_sweep
from crysforge.launch.cluster.submission import Submission
from crysforge.trainer.base.command_line import parse
from crysforge.trainer.jobs.schemas import FinetuneJob

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
        (
            ["job=pretrain", *FINETUNE[1:2], FINETUNE[3], "run_dir=r", "stages=[vea]"],
            ["'vea'", "'vae'"],
        ),
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
        ask(*argv).runs()
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
    with pytest.raises(ValueError, match="time"):
        minutes(text)


# --- sweeps --------------------------------------------------------------------------------------


def test_grid_on_the_command_line():
    runs = read_sweep("[target=[a,b],finetune.lr=[1e-3,2],name=['x,y']]")
    assert len(runs) == 4
    assert runs[0] == {"target": "a", "finetune.lr": 0.001, "name": "x,y"}
    assert runs[3] == {"target": "b", "finetune.lr": 2, "name": "x,y"}


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
        ("[]", "no run"),
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
def test_names_of_runs_are_different_safe_file_names(runs):
    runs = [json.loads(c) for c in dict.fromkeys(json.dumps(c, sort_keys=True) for c in runs)]
    found = names(runs)
    assert len(set(found)) == len(runs)
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
    run = merge(base, {"finetune.lr": 2.0, "label_fraction": 0.2})
    assert run == {"finetune": {"lr": 2.0, "epochs": 3}, "seed": 0, "label_fraction": 0.2}
    assert base["finetune"]["lr"] == 1.0


def test_every_cell_has_an_output_of_its_own(tmp_path):
    runs = ask(*FINETUNE, "run_dir=runs/s", "sweep=[seed=[0,1],label_fraction=[0.2,1.0]]").runs()
    assert [c.output for c in runs] == [
        f"runs/s/seed={s},label_fraction={f}" for s in (0, 1) for f in (0.2, 1.0)
    ]
    assert all(c.config["run_dir"] == c.output and c.config["target"] == "gap" for c in runs)
    runs = ask(
        "job=predict", "checkpoint=C", "output=p/all.csv", "input=x", "sweep=[input=[a.csv,b.csv]]"
    ).runs()
    assert [c.output for c in runs] == ["p/all/input=a.csv.csv", "p/all/input=b.csv.csv"]
    path = tmp_path / "s.yaml"
    path.write_text("- {seed: 0, run_dir: r}\n- {seed: 1, run_dir: r}\n")
    with pytest.raises(ValueError, match="several runs of the sweep write r"):
        ask(*FINETUNE, "run_dir=runs/s", f"sweep={path}").runs()


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
    assert "--wait=30" in srun and "--cpus-per-task=8" in srun


def test_script_leaves_out_what_was_not_asked():
    """So that the site's defaults hold: no partition, no time limit, no wckey."""
    text = script(slurm_executor(ask("job=pretrain").config, "r", Path("/f"), Path("/c")), 1)
    for option in ("time", "partition", "account", "wckey", "mem", "gpus", "array", "constraint"):
        assert f"--{option}" not in text


def test_nothing_that_users_write_is_run_by_the_script(tmp_path):
    """The script is run by a real shell in which srun only shows its arguments."""
    folder = tmp_path / HOSTILE.replace("/", "")
    settings = ("name", "mem", "partition", "account", "constraint", "qos", "slurm.comment")
    config = ask("job=pretrain", *(f"{key}={HOSTILE}" for key in settings)).config
    text = script(slurm_executor(config, "run", folder, folder / "code-1"), 1)
    package = folder / "code-1/crysforge/launch/cluster"
    package.mkdir(parents=True)
    (package / "worker.py").write_text("import sys; print(*sys.argv[1:], sep='\\n')")
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
    shown = done.stdout.splitlines()
    assert shown[0] == str(folder / "code-1")
    assert shown[-3:] == [str(folder / "logs"), str(folder / "logs"), "0"]  # submitit's, and ours
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("name", ["a%jb", "a\nb"])
def test_paths_that_slurm_would_read_otherwise_are_refused(name):
    with pytest.raises(ValueError, match=r"a%jb|cannot be printed"):
        slurm_executor(ask("job=pretrain").config, "r", Path("/") / name, Path("/c"))


def test_dry_run_shows_the_script_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["submit", *FINETUNE, "run_dir=r/s", "sweep=[seed=[0,1]]", "--dry-run"]
    )
    submit.main()
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-1%2" in out and "# seed=1: finetune → r/s/seed=1" in out
    assert not list(tmp_path.iterdir())


def test_request_help_lists_everything(capsys):
    for argv in ([], ["--help"]):
        with pytest.raises(SystemExit):
            ask(*argv)
    assert "array_parallelism" in capsys.readouterr().out
    assert request.JOBS.keys() == {"pretrain", "finetune", "prepare", "predict"}


# --- what is typed, and what comes in files -------------------------------------------------------


def recorded(request: Request) -> list[str]:
    """Arguments of the jobs' scripts."""
    submission = request.submission()
    tasks = request.tasks(submission, request.runs(), Path("code"))
    return [task.argv[1:] for task in tasks]


def test_a_job_opens_what_was_typed_when_it_was_submitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKEN", "s3cret")
    data = "data='http://h/${oc.env:TOKEN}'"
    asked = ask("job=finetune", data, *FINETUNE[2:], "run_dir=runs/a")
    ((option, path, record),) = recorded(asked)
    assert option == "--config" and "s3cret" not in record  # everybody sees arguments
    assert parse(FinetuneJob, None, [option, path, record]).data == "http://h/s3cret"
    with pytest.raises(ValueError, match="only if it is typed"):
        parse(FinetuneJob, None, [option, path])
    Path(path).write_text(Path(path).read_text().replace("s3cret", "other"))
    with pytest.raises(ValueError, match="only if it is typed"):
        parse(FinetuneJob, None, [option, path, record])


def test_places_in_sweeps_are_typed_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = (*FINETUNE[2:], "run_dir=runs/a")
    asked = ask("job=finetune", *rest, "sweep=[data=[s3://b/x,s3://b/y]]")
    found = [parse(FinetuneJob, None, argv).data for argv in recorded(asked)]
    assert found == ["s3://b/x", "s3://b/y"]
    Path("sweep.yaml").write_text("data: [s3://b/x]\n")
    Path("list.yaml").write_text("- {data: 'pipe:touch x'}\n")
    Path("env.yaml").write_text("data: ['${oc.env:HOME}']\n")
    for name, words in (("sweep", "typed"), ("list", "typed"), ("env", "values elsewhere")):
        with pytest.raises(ValueError, match=words):
            ask("job=finetune", *rest, f"sweep={name}.yaml").runs()


@pytest.mark.parametrize("key", ["sweep: '[data=[pipe:x]]'", "suite: a.yaml", "site: b.yaml"])
def test_a_site_file_says_nothing_of_jobs(key, tmp_path):
    (tmp_path / "site.yaml").write_text(key)
    with pytest.raises(ValueError, match="unknown setting"):
        ask("job=pretrain", f"site={tmp_path / 'site.yaml'}")


def test_cells_lie_beside_their_submission(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ask(*FINETUNE, "run_dir=runs/a", f"sweep=[run_dir=[runs/a/x,{tmp_path.parent}/y]]")
    with pytest.raises(ValueError, match="lies elsewhere than"):
        recorded(asked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "has schema 2"),
        ({"job": "rm"}, "job must be"),
        ({"runs": {"../a": {"output": "../runs", "values": {}}}}, "a file's name"),
        ({"runs": {"a": {"output": "../../runs", "values": {}}}}, "the output of a is not beside"),
        ({"runs": {"a": {"output": "/etc", "values": {}}}}, "a path beside the folder"),
        ({"history": [{"cluster": "slurm"}]}, "missing key 'history"),
        ({"history": {}}, "history must be a list"),
    ],
)
def test_a_strangers_submission(change, words, tmp_path):
    folder = tmp_path / "runs.submit"
    folder.mkdir()
    record = {"schema": 1, "job": "finetune", "runs": {}, "history": []}
    (folder / "submission.json").write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=words) as error:
        Submission.read(folder)
    assert "submission.json" in str(error.value) and "\n" not in str(error.value)
