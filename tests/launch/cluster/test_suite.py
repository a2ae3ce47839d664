"""Suites: which runs they consist of, what starts from what, and how they are run."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.storage.dataset import DatasetWriter
from crysforge.launch import submit
from crysforge.launch.cluster.code import ROOT
from crysforge.launch.cluster.config import SubmitConfig
from crysforge.launch.cluster.planning.jobs import groups, settings_of, waves
from crysforge.launch.cluster.planning.suite import SuitePlan
from crysforge.launch.cluster.status import statuses
from crysforge.launch.evaluate import find
from crysforge.trainer.evaluation.compare import arms_of, compare
from crysforge.trainer.evaluation.results import gather

SUITES = sorted((ROOT / "configs" / "suites").glob("*.yaml"))

TINY = {
    "title": "Tiny",
    "baseline": "pretraining=none",
    "data": {"a": {"source": "made here"}, "b": {"source": "somewhere far"}},
    "runs": {
        "made": {
            "data": "b",
            "per": ["encoder"],
            "settings": {
                "stages": ["vae"],
                "vae.max_steps": 2,
                "vae.batch_size": 4,
            },
        }
    },
    "settings": {"finetune.max_steps": 2, "finetune.batch_size": 4},
    "factors": {
        "task": {"energy": {"data": "a", "target": "e"}},
        "encoder": {
            "big": {"encoder.name": "pddformer", "encoder.tiny": True},
            "other": {"encoder": {"name": "cgcnn", "tiny": True}},
        },
        "pretraining": {"none": {"init_from": "none"}, "ours": {"init_from": "made"}},
        "seed": [0, 1],
    },
}

ONE_ENCODER = {"other": TINY["factors"]["encoder"]["other"]}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a suite, TINY with changes, and returns its path; data set `a` and `b` are there."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        with DatasetWriter(tmp_path / "data" / name, ["e"]) as writer:
            for i in range(12):
                split = ("train", "train", "val", "test")[i % 4]
                writer.add(split, salt(f"{name}{i}", i))
            writer.finish({})

    def write(**changes):
        path, suite = tmp_path / "suite.yaml", {**TINY, "output": str(tmp_path / "out"), **changes}
        path.write_text(yaml.safe_dump(suite, sort_keys=False))
        return str(path)

    return write


def salt(id: str, i: int) -> Crystal:
    frac = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])
    return Crystal(id, np.array([11, 17]), frac, np.eye(3) * (3 + 0.1 * i), {"e": float(i)})


def test_every_combination_is_a_cell_after_the_run_it_starts_from(file):
    suite = SuitePlan([file()], [])
    finetunings = [c for c in suite.runs if c.job == "finetune"]
    assert len(finetunings) == 2 * 2 * 2
    assert len({c.output for c in suite.runs}) == len(suite.runs) == 8 + 2
    done: set[str] = set()
    for run in suite.runs:
        assert set(run.after) <= done
        done.add(run.name)
    for run in finetunings:
        assert run.config["seed"] == run.values["seed"]
        encoder = {"big": "pddformer", "other": "cgcnn"}[run.values["encoder"]]
        assert run.config["encoder"]["name"] == encoder
        if run.values["pretraining"] == "none":
            assert run.after == ()
            continue
        (start,) = (c for c in suite.runs if (c.name,) == run.after)
        assert start.output == run.config["init_from"]
        assert start.config["encoder"] == run.config["encoder"]
        assert start.values == {"pretraining": "ours", "encoder": run.values["encoder"]}


def test_a_setting_changes_no_more_than_it_names(file, tmp_path):
    """Also where a section of the config file has more in it, and however the key is written."""
    (tmp_path / "fine.yaml").write_text("finetune: {lr: 0.005, epochs: 7}")
    (tmp_path / "pre.yaml").write_text("vae: {lr: 0.006}")
    settings = {"stages": ["vae"], "vae": {"max_steps": 2}}
    runs = {"made": {**TINY["runs"]["made"], "config": ["pre.yaml"], "settings": settings}}
    path = file(config=["fine.yaml"], runs=runs)
    suite = SuitePlan([path], ["settings.finetune.max_steps=3", "runs.made.settings.vae.epochs=1"])
    found = {c.job: c.config for c in suite.runs}
    changed = {"lr": 0.005, "epochs": 7, "max_steps": 3, "batch_size": 4}
    assert found["finetune"]["finetune"] == changed
    assert found["pretrain"]["vae"] == {"lr": 0.006, "max_steps": 2, "epochs": 1}


def test_an_override_that_is_a_mapping_takes_the_place_of_what_it_names(file):
    """So no run is started that nobody asked for; single settings still change no more than
    themselves."""
    two = {"energy": {"data": "a", "target": "e"}, "other": {"data": "b", "target": "e"}}
    path = file(factors={**TINY["factors"], "task": two})

    def tasks(*overrides):
        suite = SuitePlan([path], list(overrides))
        return {c.values["task"] for c in suite.runs if c.job == "finetune"}, suite

    assert tasks()[0] == {"energy", "other"}
    assert tasks("factors.task={mine: {data: b, target: e}}")[0] == {"mine"}
    both = ["factors.task={mine: {data: b, target: e}}", "factors.task.more={data: a, target: e}"]
    assert tasks(*both)[0] == {"mine", "more"}
    assert tasks("factors.task.more.data=a", "factors.task.more.target=e")[0] == {
        "energy", "other", "more",
    }  # fmt: skip
    _, suite = tasks("settings={}", "settings.finetune.max_steps=9")
    assert {tuple(c.config["finetune"].items()) for c in suite.runs if c.job == "finetune"} == {
        (("max_steps", 9),)
    }
    _, suite = tasks("factors.seed=[4]", "factors.task={mine: {data: b, target: e}}")
    assert [c.values["seed"] for c in suite.runs if c.job == "finetune"] == [4] * 4


def test_the_plan_names_every_run_and_what_it_costs(file, monkeypatch, capsys):
    def plan(*argv):
        monkeypatch.setattr("sys.argv", ["submit.py", f"suite={path}", "cluster=local", *argv])
        submit.main()
        return capsys.readouterr().out

    encoder = {"paper": {"encoder.name": "cgcnn"}}
    settings = {"finetune.epochs": 600, "label_count": 3}
    runs = {"made": {**TINY["runs"]["made"], "settings": {"stages": ["vae"], "vae.epochs": 10}}}
    path = file(runs=runs, settings=settings, factors={**TINY["factors"], "encoder": encoder})
    said = plan("--dry-run", "hardware=cpu")
    names = {run.name for run in SuitePlan([path], []).runs}
    assert len(names) == 5 and all(f"# {name}: " in said for name in names)
    assert said.count("(vae: 60 crystals") == 1  # 10 epochs of 6
    assert said.count("(finetune: 1,800 crystals") == 4
    hours = 4 * 1800 / (3766 * 9.2 / 2) / 3600  # cells of two atoms
    assert f"finetune: 7,200 crystals in all, {60 * hours:.1f} device-minutes of cpu" in said
    said = plan("--dry-run", "hardware=h200", "rates.finetune=2")
    assert "finetune: 7,200 crystals in all, 1.0 device-hours of h200" in said
    assert "not measured: crystals/s of vae on h200, or give rates.vae=N" in said
    assert "\n# pretrain: 60 crystals in all\n" in said
    said = plan("--dry-run", "settings.finetune.max_steps=5", "settings.finetune.batch_size=2")
    assert said.count("(finetune: 10 crystals)") == 4
    (suite,) = [SuitePlan([path], ["hardware=h200"])]
    assert {c.config["trainer"]["precision"] for c in suite.runs} == {"bf16"}


def test_a_run_that_starts_from_a_run_comes_after_it(file):
    runs = {
        **TINY["runs"],
        "taught": {
            "job": "finetune",
            "data": "b",
            "settings": {"target": "e", "init_from": "made"},
            "per": ["encoder"],
        },
    }
    factors = {**TINY["factors"], "pretraining": {"none": {}, "taught": {"init_from": "taught"}}}
    suite = SuitePlan([file(runs=runs, factors=factors)], [])
    names = [c.name for c in suite.runs]
    for encoder in ("big", "other"):
        assert names.index(f"made,encoder={encoder}") < names.index(f"taught,encoder={encoder}")
    assert [len(w) for w in waves(suite.runs)] == [2, 4, 2, 4]
    assert {c.job for c in waves(suite.runs)[0]} == {"pretrain"}


def test_cells_that_wait_for_the_same_run_are_one_array(file):
    suite = SuitePlan([file()], [])
    assert sorted((len(g), g[0].after) for g in groups(suite.runs)) == [
        (2, ()),
        (2, ("made,encoder=big",)),
        (2, ("made,encoder=other",)),
        (4, ()),
    ]
    config = SubmitConfig(nodes=2, gpus=4, slurm={"dependency": "singleton"})
    own = settings_of(config, "finetune", ["7", "8_1"])
    assert (own.nodes, own.gpus, own.processes) == (1, 1, 1)
    assert own.slurm["dependency"] == "singleton,afterok:7:8_1"
    assert settings_of(config, "pretrain") == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factors": {}}, ["needs factors"]),
        ({"factors": {"seed": []}}, ["'seed' has no values"]),
        ({"factors": {"seed": 3}}, ["'seed' needs a list"]),
        ({"baseline": "pretraning=none"}, ["'pretraning'", "'pretraining'"]),
        ({"baseline": "pretraining=non"}, ["'non'", "'none'"]),
        ({"facters": {}}, ["'facters'", "'factors'"]),
        ({"runs": {"made": {"data": "b", "per": ["encodr"]}}}, ["'encodr'", "'encoder'"]),
        ({"runs": {"made": {"data": "c"}}}, ["'c'", "valid: a, b"]),
        ({"runs": {"made": {"job": "predict"}}}, ["pretrain or finetune", "'predict'"]),
        ({"runs": {}}, ["init_from: unknown name 'made'"]),
        ({"settings": {"finetune.epoch": 1}}, ["'finetune.epoch'", "'epochs'"]),
        ({"exclude": [{"seeds": 1}]}, ["'seeds'", "'seed'"]),
        ({"exclude": [{"task": "energy"}]}, ["no run left"]),
        ({"output": ""}, ["'output' is required"]),
    ],
)
def test_a_mistake_is_named(file, changes, words):
    with pytest.raises(ValueError) as error:
        SuitePlan([file(**changes)], [])
    for word in words:
        assert word in str(error.value)


def test_a_missing_data_set_is_named_with_where_it_comes_from(file, tmp_path):
    path = file()
    (tmp_path / "data" / "b" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=re.escape("b is not at data/b — somewhere far")):
        SuitePlan([path], [])
    suite = SuitePlan([path], ["skip_missing=true"])
    assert {c.values["pretraining"] for c in suite.runs} == {"none"}
    assert list(suite.missing) == ["b"]
    moved = (tmp_path / "data" / "a").rename(tmp_path / "elsewhere")
    suite = SuitePlan([path], [f"data.a.path={moved}", f"data.b.path={moved}"])
    assert {c.config["data"] for c in suite.runs} == {str(moved)}


def test_some_values_of_a_factor_can_be_chosen(file):
    suite = SuitePlan([file()], ["only.encoder=[other]", "only.seed=[1]"])
    assert {(c.values["encoder"], c.values.get("seed", 1)) for c in suite.runs} == {("other", 1)}
    for chosen, word in (("only.encoder=[othr]", "'othr'"), ("only.seed=[2]", "'2'")):
        with pytest.raises(ValueError, match=f"only.*{word}"):
            SuitePlan([file()], [chosen])


def test_what_is_the_same_run_is_trained_once(file):
    """Whatever it is called, and also below runs that start from it."""
    runs = {
        **TINY["runs"],
        "again": {**TINY["runs"]["made"]},
        "more": {
            "data": "b",
            "per": ["encoder"],
            "settings": {"stages": ["joint"], "init_from": "again", "joint.max_steps": 1},
        },
    }
    pretraining = {name: {"init_from": name} for name in ("made", "again", "more")}
    factors = {**TINY["factors"], "encoder": ONE_ENCODER, "pretraining": pretraining}
    suite = SuitePlan([file(runs=runs, factors=factors, baseline="")], [])
    made = {c.name for c in suite.runs if c.job == "pretrain"}
    assert made == {"made,encoder=other", "more,encoder=other"}
    more = next(c for c in suite.runs if c.name == "more,encoder=other")
    assert more.after == ("made,encoder=other",) and more.config["init_from"].endswith(more.after)
    after = {(c.values["pretraining"], c.after) for c in suite.runs if c.job == "finetune"}
    assert {a for p, a in after if p != "more"} == {("made,encoder=other",)}


def test_excluded_combinations_are_no_cells(file):
    suite = SuitePlan([file(exclude=[{"pretraining": "ours", "encoder": "other"}])], [])
    assert {c.name for c in suite.runs if c.job == "pretrain"} == {"made,encoder=big"}
    assert sum(c.job == "finetune" for c in suite.runs) == 6


def test_a_suite_runs_to_its_end_grows_and_leaves_the_unaffected_alone(
    file, tmp_path, monkeypatch, capsys
):
    path = file(factors={**TINY["factors"], "encoder": ONE_ENCODER})

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["submit.py", f"suite={path}", "cluster=debug", *argv])
        submit.main()
        return capsys.readouterr().out

    run("factors.seed=[0]")
    record = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert record["factors"] == ["task", "encoder", "pretraining", "seed"]
    assert len(record["runs"]) == 3
    for one in record["runs"].values():
        run_json = json.loads((tmp_path / "out" / one["path"] / "run.json").read_text())
        assert run_json["finished"] == (["vae"] if one["job"] == "pretrain" else ["finetune"])
    assert {s.state for s in statuses(tmp_path / "out")} == {"finished"}
    said = run()
    assert said.count("finished already") == 3
    assert len(json.loads((tmp_path / "out" / "suite.json").read_text())["runs"]) == 5


def test_what_waits_for_a_failed_run_is_left_out_and_the_rest_is_run(
    file, tmp_path, monkeypatch, capsys
):
    runs = {"made": {**TINY["runs"]["made"], "settings": {"stages": ["vae"], "init_from": "gone"}}}
    runs["gone"] = {"data": "b", "settings": {"stages": ["vae"], "encoder": {"name": "cgcnn"}}}
    path = file(runs=runs, factors={**TINY["factors"], "encoder": ONE_ENCODER})
    (tmp_path / "out" / "gone").mkdir(parents=True)
    (tmp_path / "out" / "gone" / "mine.txt").write_text("not a run")
    argv = ["submit.py", f"suite={path}", "cluster=debug", "factors.seed=[0]"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(ValueError, match="3 of 4 runs did not finish"):
        submit.main()
    assert "left out, since made,encoder=other did not finish" in capsys.readouterr().out
    states = {s.name: s.state for s in statuses(tmp_path / "out")}
    assert states.pop("gone") == "failed"
    assert sorted(states.values()) == ["finished", "not started", "not started"]


def test_a_suite_runs_over_folds_and_seeds_which_are_replicates(file, tmp_path, monkeypatch):
    """What is pretrained is made anew for each fold, and nothing sees the crystals it is tested
    on."""
    with DatasetWriter(tmp_path / "data" / "f", ["e"], folds=2) as writer:
        for i in range(24):
            writer.add("train", salt(f"f{i}", i), fold=(i % 2, 2 - i % 2 if i % 8 < 2 else 0))
        writer.finish({})
    runs = {"made": {**TINY["runs"]["made"], "data": "f", "per": ["fold"]}}
    runs["made"]["settings"] |= {"encoder": {"name": "cgcnn", "tiny": True}}
    factors = {
        "task": {"energy": {"data": "f", "target": "e"}},
        "pretraining": TINY["factors"]["pretraining"],
        "fold": [0, 1],
        "seed": [3],
    }
    settings = {**TINY["settings"], "encoder": {"name": "cgcnn", "tiny": True}}
    data = {"f": {"source": "made here"}}
    path = file(data=data, runs=runs, factors=factors, settings=settings)
    monkeypatch.setattr("sys.argv", ["submit.py", f"suite={path}", "cluster=debug"])
    submit.main()
    assert {s.name for s in statuses(tmp_path / "out") if s.name.startswith("made")} == {
        "made,fold=0", "made,fold=1",
    }  # fmt: skip
    suite = find(tmp_path / "out")
    assert suite.folds and suite.factors == ["task", "pretraining", "seed"]
    results, missing = gather(suite)
    arms = arms_of(suite, results, missing)
    assert [len(arm.results) for arm in arms] == [2, 2] and not missing
    assert set(arms[0].results) == {"fold 0, seed 3", "fold 1, seed 3"}
    (found,) = compare(suite, arms, resamples=100)
    assert found.bootstrap.n == 24 and found.test.n == 2  # every crystal is judged once
    assert np.isnan(found.test.p_wilcoxon)


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_the_suites_here_are_sound_but_for_their_data(path, tmp_path):
    settings = [f"output={tmp_path}", f"data_dir={tmp_path}"]
    with pytest.raises(ValueError, match="data sets are missing") as error:
        SuitePlan([str(path)], settings)
    missing = re.findall(r"^  (\S+) is not at \S+ — .+", str(error.value), re.MULTILINE)
    for name in missing:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    suite = SuitePlan([str(path)], settings)
    assert suite.config.title and suite.config.baseline
    assert set(suite.config.data) == set(missing), "a data set that no run needs"
    tuned = [c for c in suite.runs if c.job == "finetune"]
    replicates = {
        c.values.get("seed", c.values.get("fold"))
        for c in tuned
        if "seed" in c.values or "fold" in c.values
    }
    assert len(replicates) >= 3


def test_data_sets_below_an_address_that_is_typed(file, tmp_path):
    remote = SuitePlan([file()], ["output=runs", "data_dir=s3://bucket"])
    assert {c.config["data"] for c in remote.runs} == {"s3://bucket/a", "s3://bucket/b"}
    one = SuitePlan([file()], ["output=runs", "data.b.path=s3://bucket/b"])
    assert {c.config["data"] for c in one.runs} == {"data/a", "s3://bucket/b"}
    for change, words in (
        ({"data_dir": "s3://bucket"}, "data_dir is 's3://bucket' in a config file"),
        ({"data": {"a": {"path": "pipe:x"}, "b": {}}}, "data.a.path is 'pipe:x' in a config file"),
        ({"data": {"source": {"path": "pipe:x"}}}, "data.source.path is 'pipe:x' in a config file"),
        ({"data": {"metadata": {"path": "pipe:x"}}}, "data.metadata.path is 'pipe:x'"),
        ({"data": {"title": "pipe:x"}}, "must be settings by name, not 'pipe:x'"),
        ({"data": {"a": ["x"], "b": {}}}, "must be settings by name, not a list of 1"),
    ):
        with pytest.raises(ValueError, match=words):
            SuitePlan([file(**change)], ["output=runs"])
    odd = {**TINY["data"], "../a": {}}
    task = {**TINY["factors"], "task": {"energy": {"data": "../a", "target": "e"}}}
    with pytest.raises(ValueError, match="no plain name below s3://bucket"):
        SuitePlan([file(data=odd, factors=task)], ["output=runs", "data_dir=s3://bucket"])


def test_a_suite_that_includes_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("include: [b.yaml]\n")
    (tmp_path / "b.yaml").write_text("include: [a.yaml]\n")
    with pytest.raises(ValueError, match="includes itself"):
        SuitePlan([str(tmp_path / "a.yaml")], ["output=runs"])
