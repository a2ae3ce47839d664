"""What is handed in to leaderboards has the form that they check."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zipfile

import numpy as np
import pytest
import yaml

from crysforge.datapipe.preparing.splitting.splits import by_fold
from crysforge.launch import leaderboard
from crysforge.trainer.base.script import run as run_script
from crysforge.trainer.serving.leaderboards import MATBENCH, digest, jarvis, matbench, scores

TASK = "matbench_jdft2d"
PERSON = {"authors": "A. Uthor", "algorithm": "crysldnet", "algorithm_long": "CrysLDNet"}
TEAM = {
    "model_name": "crysldnet",
    "team_name": "team",
    "project_url": "https://example.org/crysldnet",
    "author_email": "author@example.org",
}


def finetuned(path, ids, target="exfoliation_en", seed=0):
    """What a finished finetuning leaves behind, as far as it matters here."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(len(ids) + seed)
    metrics = {"targets": [target], "encoder": "pddformer", "seed": seed, "seconds": 2.5}
    (path / "metrics.json").write_text(json.dumps(metrics))
    (path / "config.yaml").write_text(yaml.safe_dump({"data": "data/x", "target": target}))
    with open(path / "predictions_test.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "target", "prediction"])
        for id in ids:
            label = rng.normal()
            writer.writerow([id, f"{label:.7g}", f"{label + 0.1 * rng.normal():.7g}"])
    return path


def members(fold):
    chosen = np.flatnonzero(by_fold(MATBENCH[TASK], fold, 0) == 2) + 1
    return [f"{TASK}-{n}" for n in np.random.default_rng(fold).permutation(chosen)]


@pytest.fixture
def folds(tmp_path):
    order = (3, 0, 4, 1, 2)
    return [finetuned(tmp_path / "runs" / f"{k}", members(k)) for k in order]


def test_matbench_gets_all_folds_under_its_own_ids(folds, tmp_path):
    means = matbench(folds, tmp_path / "out", PERSON)
    record = json.loads(gzip.decompress((tmp_path / "out" / "results.json.gz").read_bytes()))
    assert set(record) == {
        "@module", "@class", "version", "benchmark_name", "user_metadata", "tasks", "datestamp",
        "hash",
    }  # fmt: skip
    task = record["tasks"][TASK]
    assert set(task) == {"@module", "@class", "benchmark_name", "dataset_name", "results"}
    assert (task["dataset_name"], task["benchmark_name"]) == (TASK, record["benchmark_name"])
    assert sorted(task["results"]) == [f"fold_{k}" for k in range(5)]
    seen: set[str] = set()
    for k in range(5):
        fold = task["results"][f"fold_{k}"]
        assert set(fold) == {"data", "parameters", "scores"}
        wanted = {f"mb-jdft2d-{int(id.split('-')[1]):03d}" for id in members(k)}
        assert set(fold["data"]) == wanted and not seen & wanted
        assert all(isinstance(v, float) for v in [*fold["data"].values(), *fold["scores"].values()])
        assert set(fold["scores"]) == {"mae", "rmse", "mape", "max_error"}
        seen |= wanted
    assert len(seen) == MATBENCH[TASK]
    mean = np.mean([f["scores"]["mae"] for f in task["results"].values()])
    assert means == {TASK: pytest.approx(mean)}
    info = json.loads((tmp_path / "out" / "info.json").read_text())
    keys = {"authors", "algorithm", "algorithm_long", "bibtex_refs", "notes", "requirements"}
    assert set(info) == keys


def test_the_checksum_is_of_sorted_json(folds, tmp_path):
    matbench(folds, tmp_path / "out", PERSON)
    record = json.loads(gzip.decompress((tmp_path / "out" / "results.json.gz").read_bytes()))

    def ordered(value):
        if isinstance(value, dict):
            return {k: ordered(v) for k, v in sorted(value.items())}
        return value

    said = record.pop("hash")
    assert said == hashlib.sha256(json.dumps(ordered(record)).encode()).hexdigest()
    record["tasks"][TASK]["results"]["fold_0"]["scores"]["mae"] += 1e-9
    assert said != digest(record)


def test_the_scores_are_matbenchs():
    label, guess = np.array([2.0, -4.0, 1e-6, 0.5]), np.array([1.0, -4.0, 3.0, 1.0])
    found = scores(label, guess)
    assert found["mae"] == pytest.approx((1 + 0 + 3 - 1e-6 + 0.5) / 4)
    assert found["max_error"] == pytest.approx(3, abs=1e-5)
    assert found["mape"] == pytest.approx((0.5 + 0 + 1) / 3), "a label of nearly 0 does not count"
    assert found["rmse"] == pytest.approx(np.sqrt((1 + 9 + 0.25) / 4), abs=1e-5)


@pytest.mark.parametrize(
    "case", ["missing", "twice", "filtered", "other", "metadata", "unfinished"]
)
def test_what_matbench_would_refuse_is_not_written(folds, tmp_path, case):
    runs, person = list(folds), dict(PERSON)
    if case == "missing":
        runs.pop(0)
    elif case == "twice":
        runs[0] = finetuned(tmp_path / "again", members(0))
    elif case == "filtered":
        runs[0] = finetuned(tmp_path / "filtered", members(3)[1:])
    elif case == "other":
        runs[0] = finetuned(tmp_path / "other", ["mp-1", "mp-2"])
    elif case == "metadata":
        del person["authors"]
    else:
        (runs[0] / "metrics.json").unlink()
    words = {
        "missing": "no run of fold 3", "twice": "fold 0 of matbench_jdft2d already",
        "filtered": "not those of an official fold", "other": "not of one Matbench task",
        "metadata": "metadata.authors", "unfinished": "no finished finetuning",
    }  # fmt: skip
    with pytest.raises(ValueError, match=words[case]):
        matbench(runs, tmp_path / "out", person)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_jarvis_gets_a_zipped_table_for_each_property(tmp_path):
    ids = [f"JVASP-{i}" for i in range(7)]
    runs = [finetuned(tmp_path / t, ids, t) for t in ("mbj_bandgap", "slme")]
    names = jarvis(runs, tmp_path / "out", {**TEAM, "hardware_used": "1 GPU"})
    assert names == [
        f"AI-SinglePropertyPrediction-{t}-dft_3d-test-mae.csv.zip" for t in ("mbj_bandgap", "slme")
    ]
    for run, name in zip(runs, names, strict=True):
        with zipfile.ZipFile(tmp_path / "out" / name) as archive:
            (entry,) = archive.namelist()
            assert entry == name.removesuffix(".zip")
            rows = list(csv.DictReader(io.StringIO(archive.read(entry).decode())))
        with open(run / "predictions_test.csv") as file:
            known = {r["id"]: r["prediction"] for r in csv.DictReader(file)}
        assert list(rows[0]) == ["id", "prediction"]
        assert {r["id"]: r["prediction"] for r in rows} == known
    about = json.loads((tmp_path / "out" / "metadata.json").read_text())
    needed = {
        "model_name", "project_url", "date_submitted", "author_email", "database_version",
        "team_name", "time_taken_seconds", "language", "os", "software_used", "hardware_used",
        "git_url",
    }  # fmt: skip
    assert needed <= set(about) and about["hardware_used"] == "1 GPU"
    assert about["time_taken_seconds"] == 5.0
    script = (tmp_path / "out" / "run.sh").read_text()
    assert script.count("launch/finetune.py") == 2


@pytest.mark.parametrize("odd", ["=1+1", "", "x", "@a"])
def test_what_is_no_number_is_no_prediction_for_jarvis(odd, tmp_path):
    run = finetuned(tmp_path / "run", ["JVASP-1", "JVASP-2"], "slme")
    path = run / "predictions_test.csv"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, f"{last.rpartition(',')[0]},{odd}"]) + "\n")
    with pytest.raises(ValueError, match=r"is no (finite )?number") as error:
        jarvis([run], tmp_path / "out", TEAM)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_runs_can_come_from_a_suite(folds, tmp_path, monkeypatch, capsys):
    listed = {
        f"fold={run.name}": {
            "path": run.name,
            "job": "finetune",
            "values": {"pretraining": "ours", "fold": run.name},
        }
        for run in folds
    }  # fmt: skip
    listed["none"] = {"path": "gone", "job": "finetune", "values": {"pretraining": "none"}}
    listed["start"] = {"path": "start", "job": "pretrain", "values": {"pretraining": "ours"}}
    record = {"schema": 1, "title": "Folds", "baseline": "", "factors": ["pretraining", "fold"]}
    record["runs"] = listed
    (tmp_path / "runs" / "suite.json").write_text(json.dumps(record))
    base = ["leaderboard", "to=matbench", f"suite={tmp_path / 'runs'}"]
    base += [f"metadata.{k}={v}" for k, v in PERSON.items()]

    def call(*argv):
        monkeypatch.setattr("sys.argv", [*base, *argv])
        run_script(leaderboard.main)

    call(f"output={tmp_path / 'out'}", "where={pretraining: ours}")
    assert f"{TASK}: MAE" in capsys.readouterr().out
    for where, words in (("{pretrainin: ours}", "'pretraining'"), ("{fold: 9}", "no finetuning")):
        with pytest.raises(SystemExit):
            call(f"output={tmp_path / 'out2'}", f"where={where}")
        assert words in capsys.readouterr().err


def test_a_run_of_several_targets_is_none_for_a_leaderboard(tmp_path):
    run = finetuned(tmp_path / "both", ["a", "b"])
    table = run / "predictions_test.csv"
    head = "id,target_x,prediction_x,target_y,prediction_y"
    table.write_text("\n".join([head, *(f"{id},1,2,3,4" for id in "ab")]) + "\n")
    with pytest.raises(ValueError, match="one target is needed"):
        jarvis([run], tmp_path / "out", TEAM)
