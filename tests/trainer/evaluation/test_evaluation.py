"""Evaluating suites: what is gathered, compared and written, and what is said of the rest."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crysforge.datapipe.common.files import write_json
from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.launch.evaluate import find
from crysforge.trainer.evaluation.compare import arms_of, compare, mean_improvements
from crysforge.trainer.evaluation.results import gather
from crysforge.trainer.evaluation.suite import Suite
from crysforge.trainer.jobs.tables import classification_scores
from crysforge.trainer.reports.config import EvaluateConfig
from crysforge.trainer.reports.report import evaluate
from tests.evaluation_runs import arms_and_seeds, dataset, finetuned, suite

ROOT = Path(__file__).resolve().parents[3]


def compared(root: Path, **settings):
    """(arms, comparisons) of the suite at a path."""
    found = Suite.read(root)
    arms = arms_of(found, *gather(found))
    return arms, compare(found, arms, **{"resamples": 200, **settings})


def write(root: Path, **settings):
    config = EvaluateConfig(suite=str(root), figures=False, resamples=100, **settings)
    return evaluate(find(root), config)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- what is compared ----------------------------------------------------------------------------


def test_arms_are_compared_by_seed_and_by_crystal(tmp_path):
    arms, (found,) = compared(arms_and_seeds(tmp_path, {"none": 0.2, "crysldnet": 0.1}))
    runs = [
        read_mapping(tmp_path / f"crysldnet-{s}" / "metrics.json")["test"]["mae"] for s in (0, 1, 2)
    ]
    base = [read_mapping(tmp_path / f"none-{s}" / "metrics.json")["test"]["mae"] for s in (0, 1, 2)]
    assert arms[1].summary().mean == pytest.approx(np.mean(runs))
    assert arms[1].summary().std == pytest.approx(np.std(runs, ddof=1))
    assert found.seeds == ["0", "1", "2"]
    assert found.test.difference == pytest.approx(np.mean(runs) - np.mean(base))
    assert found.improvement == pytest.approx(100 * (1 - np.mean(runs) / np.mean(base)))
    assert found.bootstrap.n == 40
    assert found.bootstrap.difference == pytest.approx(found.test.difference, rel=1e-4)
    assert found.p_holm == found.test.p  # one comparison


def test_a_seed_without_a_partner_is_left_out_and_named(tmp_path):
    root = arms_and_seeds(tmp_path, {"none": 0.2, "a": 0.1, "b": 0.15})
    write_json(root / "none-1" / "run.json", {"finished": []})
    _, (a, _) = compared(root)
    assert a.seeds == ["0", "2"] and a.left_out == ["a-1"]
    report = write(root)
    text = (report.path / "report.md").read_text()
    assert report.missing == 1
    assert "8 of 9 finetunings" in text and "left out of the pairs: a-1" in text
    assert "| none-1 | not finished |" in text
    assert "(2 of 3)" in (report.path / "tables" / "results.md").read_text()


def test_missing_runs_are_told_apart(tmp_path):
    root = arms_and_seeds(tmp_path, {"none": 0.2, "a": 0.1}, seeds=(0, 1, 2, 3, 4))
    write_json(root / "a-0" / "run.json", {"finished": []})
    beat = {"status": "running", "step": 30, "total": 100}
    write_json(root / "a-0" / "heartbeat.json", beat)
    (root / "a-1" / "metrics.json").write_text("{")
    (root / "a-2" / "predictions_test.csv").write_text("id,target,prediction\nx,1,nan\n")
    (root / "a-3" / "predictions_test.csv").write_text("id,target,prediction\nx,1,9\n")
    record = read_mapping(root / "suite.json")
    record["runs"]["a-5"] = {**record["runs"]["a-4"], "path": "nowhere"}
    record["runs"]["a-5"]["values"] = {"pretraining": "a", "seed": 5}
    write_json(root / "suite.json", record)
    found = Suite.read(root)
    results, missing = gather(found)
    reasons = {m.run.name: m.reason for m in missing}
    assert len(results) == 6
    assert reasons.keys() == {"a-0", "a-1", "a-2", "a-3", "a-5"}
    assert reasons["a-0"] == "not finished: running at step 30 of 100"
    assert "metrics.json is not valid JSON" in reasons["a-1"]
    assert "no number" in reasons["a-2"]
    assert "different runs" in reasons["a-3"]
    assert reasons["a-5"] == "not started"


def test_identical_arms_have_no_difference(tmp_path):
    _, (found,) = compared(arms_and_seeds(tmp_path, {"none": 0.2, "same": 0.2}))
    assert (found.improvement, found.test.p, found.bootstrap.p) == (0, 1, 1)


def test_only_crystals_in_common_are_compared(tmp_path):
    root = arms_and_seeds(tmp_path, {"none": 0.2}, seeds=(0,))
    finetuned(root / "a", 0.1, count=30, fingerprint="other")
    runs = {name: {"pretraining": name[:4].rstrip("-"), "seed": 0} for name in ("none-0", "a")}
    suite(root, runs, ["pretraining", "seed"])
    _, (found,) = compared(root)
    assert found.bootstrap.n == 30
    assert found.notes == [
        "seed 0: the runs' data sets differ",
        "seed 0: 30 crystals in common",
    ]


def test_rows_are_the_other_factors_and_gains_are_averaged_over_them(tmp_path):
    runs = {}
    for task, errors in {"x": (0.2, 0.1), "y": (0.4, 0.3)}.items():
        for pretraining, error in zip(("none", "dpf"), errors, strict=True):
            name = f"{task}-{pretraining}"
            finetuned(tmp_path / name, error)
            runs[name] = {"task": task, "pretraining": pretraining, "seed": 0}
    suite(tmp_path, runs, ["task", "pretraining", "seed"])
    _, found = compared(tmp_path)
    assert [c.improvement for c in found] == pytest.approx([50, 25], abs=0.01)
    assert mean_improvements(found, "pretraining")["dpf"] == (pytest.approx(37.5, abs=0.01), 2)
    table = rows(write(tmp_path).path / "tables" / "results.csv")
    assert [r["task"] for r in table] == ["x", "y"]
    assert float(table[1]["dpf"]) < float(table[1]["none"])
    other = write(tmp_path, columns="task", rows=["pretraining"])
    assert [r["pretraining"] for r in rows(other.path / "tables" / "results.csv")] == [
        "none",
        "dpf",
    ]


def test_columns_of_other_units_say_theirs(tmp_path):
    runs = {}
    for task, unit, scale in (("gap", "eV", 1), ("bulk", "GPa", 100)):
        for pretraining, error in (("none", 0.2), ("dpf", 0.1)):
            name = f"{task}-{pretraining}"
            finetuned(tmp_path / name, error * scale, unit=unit)
            runs[name] = {"task": task, "pretraining": pretraining, "seed": 0}
    suite(tmp_path, runs, ["task", "pretraining", "seed"])
    across = write(tmp_path).main
    assert across.columns[:4] == ["task", "unit", "none", "dpf"]
    assert [row[1] for row in across.rows] == ["eV", "GPa"]
    down = write(tmp_path, columns="task").main
    assert down.columns == ["pretraining", "gap (eV)", "bulk (GPa)"]
    assert [[e.bold for e in row[1:]] for row in down.rows] == [[False, False], [True, True]]
    assert down.rows[0][2].places < down.rows[0][1].places


def test_several_targets_of_a_run_are_several_rows(tmp_path):
    runs = {}
    for name in ("none", "a"):
        finetuned(tmp_path / name, 0.1, targets=("gap", "energy"))
        runs[name] = {"pretraining": name, "seed": 0}
    runs["b"] = {"pretraining": "b", "seed": 0}  # not started: missing in both rows
    arms, found = compared(suite(tmp_path, runs, ["pretraining", "seed"]))
    assert [(a.values["target"], a.values["pretraining"]) for a in arms] == [
        (t, p) for p in ("none", "a", "b") for t in ("gap", "energy")
    ]
    assert len(found) == 4 and sum(c.test is not None for c in found) == 2


def test_runs_that_others_start_from_are_not_compared(tmp_path):
    root = arms_and_seeds(tmp_path, {"none": 0.2, "a": 0.1})
    record = read_mapping(root / "suite.json")
    record["runs"]["start"] = {"path": "none-0", "job": "finetune", "values": {"pretraining": "a"}}
    write_json(root / "suite.json", record)
    assert len(gather(Suite.read(root))[0]) == 6


def test_yes_or_no_labels_are_scored_as_such(tmp_path):
    report = write(arms_and_seeds(tmp_path, {"none": 0.6, "a": 0.1}, binary=True))
    table = rows(report.path / "tables" / "scores.csv")
    assert float(table[1]["accuracy"]) == 1 and float(table[1]["roc_auc"]) == 1
    assert 0 < float(table[0]["accuracy"]) < 1


def test_area_under_the_curve_counts_pairs():
    label = np.array([0, 0, 1, 1, 1.0])
    score = np.array([0.1, 0.6, 0.6, 0.9, 0.2])
    better = [(p > n) + 0.5 * (p == n) for p in score[2:] for n in score[:2]]
    found = classification_scores(label, score)
    assert found["roc_auc"] == pytest.approx(np.mean(better))
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert classification_scores(np.array([0, 1, 2.0]), score[:3]) == {}


# --- suites without suite.json -------------------------------------------------------------------


def test_folds_are_replicates_that_share_no_crystal(tmp_path):
    runs = {}
    for fold in range(3):
        data = tmp_path / f"data-{fold}"
        fingerprint = dataset(data, 30, first=30 * fold)
        for pretraining, spread in (("none", 0.2), ("ours", 0.1)):
            name = f"{pretraining}-{fold}"
            finetuned(
                tmp_path / name, spread, count=30, first=30 * fold, fingerprint=fingerprint,
                data=str(data),
            )  # fmt: skip
            runs[name] = {"pretraining": pretraining, "fold": fold}
    suite(tmp_path, runs, ["pretraining", "fold"])
    record = json.loads((tmp_path / "suite.json").read_text())
    (tmp_path / "suite.json").write_text(json.dumps({**record, "replicate": "fold"}))
    _, (found,) = compared(tmp_path)
    assert found.seeds == ["0", "1", "2"] and not found.notes
    assert found.bootstrap.n == 90 and found.improvement > 20

    config = EvaluateConfig(suite=str(tmp_path), resamples=100, space_groups=False)
    report = evaluate(find(tmp_path), config)
    table = rows(report.path / "tables" / "by_atoms.csv")
    assert sum(int(r["crystals"]) for r in table) == 90
    small = []
    for fold in range(3):
        found = rows(tmp_path / f"ours-{fold}" / "predictions_test.csv")
        few = [r for r in found if 1 + int(r["id"][5:]) % 12 <= 5]
        small.append(np.mean([abs(float(r["prediction"]) - float(r["target"])) for r in few]))
    assert float(table[0]["ours"]) == pytest.approx(np.mean(small))
    assert float(table[0]["ours std"]) == pytest.approx(np.std(small, ddof=1))
    assert {p.stem for p in (report.path / "figures").glob("*.svg")} > {"atoms-gap", "elements-gap"}


def test_factors_of_plain_runs_are_the_settings_that_differ(tmp_path):
    for init, stage in (("", ""), ("runs/pre", ""), ("runs/pre", "vae")):
        for count, epochs in ((100, 5), (200, 3)):
            for seed in (0, 1):
                config = {"init_from": init, "init_stage": stage, "label_count": count}
                config |= {"finetune": {"epochs": epochs}, "loader": {"workers": seed}}
                config |= {"target": "gap", "targets": ["gap"], "seed": seed}
                finetuned(tmp_path / f"{init[5:]}{stage}-{count}-{seed}", 0.1, seed, config=config)
    found = find(tmp_path)
    assert found.factors == ["label_count", "init_from", "seed"]  # epochs follow from label_count
    assert (found.compared, found.baseline) == ("init_from", "none")
    arms = arms_of(found, *gather(found))
    assert {a.values["init_from"] for a in arms} == {"none", "pre", "pre/vae"}
    assert len(compare(found, arms, 10)) == 4


def test_a_submitted_sweep_is_evaluated_by_its_values(tmp_path):
    runs = {}
    for init in ("none", "runs/pre"):
        for seed in (0, 1):
            name = f"{init[-3:]}-{seed}"
            finetuned(tmp_path / "out" / name, 0.1, seed)
            values = {"init_from": init, "seed": seed}
            runs[name] = {"output": f"../out/{name}", "values": values}
    (tmp_path / "out.submit").mkdir()
    record = {"schema": 1, "job": "finetune", "runs": runs, "history": []}
    (tmp_path / "out.submit" / "submission.json").write_text(json.dumps(record))
    for path in (tmp_path / "out", tmp_path / "out.submit"):
        found = find(path)
        assert found.root == tmp_path / "out"
        assert (found.compared, found.baseline) == ("init_from", "none")
        assert len(gather(found)[0]) == 4


# --- the report ----------------------------------------------------------------------------------


def test_the_report_is_whole_linked_and_the_same_again(tmp_path):
    fingerprint = dataset(tmp_path / "data")
    root = arms_and_seeds(
        tmp_path / "suite", {"none": 0.2, "a": 0.1}, data=str(tmp_path / "data"),
        fingerprint=fingerprint,
    )  # fmt: skip
    config = EvaluateConfig(resamples=100)
    found = evaluate(find(root), config).path
    before = {p.relative_to(found): p.read_bytes() for p in found.rglob("*") if p.is_file()}
    text = (found / "report.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20 and all((found / link).is_file() for link in links)
    assert {str(p) for p in before} == {"report.md", *links}
    assert {"atoms", "bars", "elements", "parity", "space_groups"} <= {
        Path(x).stem.split("-")[0] for x in links
    }
    assert evaluate(find(root), config).path == found
    assert {p.relative_to(found): p.read_bytes() for p in found.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in root.iterdir() if p.name.startswith(".")) == []


def test_errors_by_atoms_are_those_of_the_crystals(tmp_path):
    fingerprint = dataset(tmp_path / "data")
    root = arms_and_seeds(tmp_path / "s", {"none": 0.2, "a": 0.1}, data="gone",
                          fingerprint=fingerprint)  # fmt: skip
    assert "no longer at gone" in (write(root).path / "report.md").read_text()
    table = rows(write(root, data=[str(tmp_path / "data")]).path / "tables" / "by_atoms.csv")
    assert [r["atoms per cell"] for r in table] == ["N ≤ 5", "5 < N < 10", "N ≥ 10"]
    assert sum(int(r["crystals"]) for r in table) == 40
    small = []
    for seed in (0, 1, 2):
        for r in rows(root / f"a-{seed}" / "predictions_test.csv"):
            if 1 + int(r["id"][5:]) % 12 <= 5:
                small.append(abs(float(r["prediction"]) - float(r["target"])))
    assert float(table[0]["a"]) == pytest.approx(np.mean(small))


def test_a_failure_leaves_the_last_report_alone(tmp_path, monkeypatch):
    root = arms_and_seeds(tmp_path, {"none": 0.2, "a": 0.1})
    path = write(root).path
    before = (path / "report.md").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("crysforge.trainer.reports.report._text", fail)
    with pytest.raises(OSError, match="disk full"):
        write(root)
    assert (path / "report.md").read_bytes() == before


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"baseline": "pretraining=dpf"}, ["no run has pretraining=dpf", "none, a"]),
        ({"baseline": "encoder=x"}, ["'encoder=x'", "pretraining"]),
        ({"baseline": "seed=0"}, ["seeds are replicates"]),
        ({"columns": "encoder"}, ["'encoder'", "pretraining"]),
        ({"paper": "crysldnett"}, ["'crysldnett'", "unified"]),
        ({"split": "val"}, ["predictions_val.csv"]),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, words):
    root = arms_and_seeds(tmp_path, {"none": 0.2, "a": 0.1}, seeds=(0,))
    with pytest.raises(ValueError) as caught:
        write(root, **settings)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (root / "report").exists()


def test_two_cells_with_the_same_values_are_refused(tmp_path):
    root = arms_and_seeds(tmp_path, {"none": 0.2}, seeds=(0,))
    runs = {"none-0": {"pretraining": "none", "seed": 0}}
    suite(root, {**runs, "again": {**runs["none-0"], "path": "none-0"}}, ["pretraining", "seed"])
    with pytest.raises(ValueError, match="'none-0' and 'again' have the same values"):
        write(root)


def test_nothing_finished_and_folders_of_others(tmp_path):
    root = suite(tmp_path, {"a": {"pretraining": "none", "seed": 0}}, ["pretraining", "seed"])
    with pytest.raises(ValueError, match=r"nothing to evaluate in .*a: not started"):
        write(root)
    (root / "report").mkdir()
    (root / "report" / "thesis.md").write_text("mine")
    with pytest.raises(ValueError, match="is there and is no report"):
        write(root)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("[]", "must hold a mapping"),
        ("{", "not valid JSON"),
        ('{"schema": 2}', "schema 2"),
        ('{"schema": 1, "title": "t"}', "missing key 'baseline'"),
    ],
)
def test_a_broken_suite_file_is_one_line(tmp_path, record, words):
    (tmp_path / "suite.json").write_text(record)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        find(tmp_path)
    assert "\n" not in str(caught.value) and "suite.json" in str(caught.value)


def test_the_command_prints_the_table_and_the_path(tmp_path):
    root = arms_and_seeds(tmp_path / "s", {"none": 0.2, "a": 0.1}, seeds=(0, 1))
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "figures=false"]
    done = subprocess.run([*command, f"suite={root}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "A suite: test MAE in eV by pretraining" in done.stdout
    assert done.stdout.rstrip().endswith(str(root / "report" / "report.md"))


def test_a_folder_without_runs_is_no_suite(tmp_path):
    with pytest.raises(ValueError, match=r"is no suite: it has neither suite\.json nor runs"):
        find(tmp_path)
