"""Ensembles: means of their members, uncertainties that fit the errors, whole or not at all."""

from __future__ import annotations

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from crysforge import load
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.serving.ensemble import MemberPredictions, calibration, create, fit_scale
from tests.launching import FINETUNE


@pytest.fixture(scope="module")
def members(data, tmp_path_factory):
    """Two finetunings that differ in their seed, and one on another property."""
    from crysforge.launch import finetune

    root, argv = tmp_path_factory.mktemp("members"), sys.argv
    try:
        for name, target, seed in (
            ("a", "density", 0),
            ("b", "density", 1),
            ("c", "ewald_energy", 0),
        ):
            sys.argv = [
                "finetune", *FINETUNE, f"data={data}", f"run_dir={root / name}", f"seed={seed}",
                f"target={target}", "init_from=none", "finetune.epochs=1",
            ]  # fmt: skip
            finetune.main()
    finally:
        sys.argv = argv
    return root


@pytest.fixture(scope="module")
def ensemble(members, tmp_path_factory):
    path = tmp_path_factory.mktemp("ensembles") / "both"
    create([str(members / "a"), str(members / "b")], path)
    return path


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_it_predicts_the_mean_and_what_its_report_says(ensemble, members, data, tmp_path):
    dataset = Dataset.open(data)
    crystals = [c for _, c in dataset.read(dataset.split_items("test"))]
    moved = shutil.copytree(ensemble, tmp_path / "moved")
    model = load(moved)
    mean, uncertainty = model.predict_with_uncertainty(crystals)
    each = np.stack([load(members / name).predict(crystals) for name in "ab"])
    np.testing.assert_allclose(mean, each.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.predict(crystals), mean)
    reported = {r["id"]: r for r in rows(ensemble / "predictions_test.csv")}
    assert set(reported) == {c.id for c in crystals}
    for crystal, value, sigma in zip(crystals, mean, uncertainty, strict=True):
        assert float(reported[crystal.id]["prediction"]) == pytest.approx(value, rel=1e-4)
        assert float(reported[crystal.id]["uncertainty"]) == pytest.approx(sigma, rel=1e-2)
        assert float(reported[crystal.id]["target"]) == pytest.approx(crystal.targets["density"])
    for (_, row), value, sigma in zip(model.iterate(crystals, 30), mean, uncertainty, strict=True):
        np.testing.assert_allclose(row, [value, sigma], rtol=1e-4)


def test_gradients_stay_on_for_the_caller(ensemble, data):
    dataset = Dataset.open(data)
    crystals = [c for _, c in dataset.read(dataset.split_items("test"))]
    rows = load(ensemble).iterate(crystals, 30)
    next(rows)
    assert torch.is_grad_enabled()
    list(rows)
    assert torch.is_grad_enabled()


def test_predict_writes_the_uncertainty_too(ensemble, data, call, tmp_path):
    output = tmp_path / "out.csv"
    code, _, err = call("predict", f"checkpoint={ensemble}", f"input={data}", f"output={output}")
    assert code == 0, err
    assert list(rows(output)[0]) == ["id", "prediction", "uncertainty"]
    assert all(float(r["uncertainty"]) > 0 for r in rows(output))


def test_uncertainties_have_the_size_of_the_validation_errors(ensemble):
    found = rows(ensemble / "predictions_val.csv")
    errors = [float(r["target"]) - float(r["prediction"]) for r in found]
    sigma = [float(r["uncertainty"]) for r in found]
    assert np.mean(np.square(sigma)) == pytest.approx(np.mean(np.square(errors)), rel=1e-4)
    metrics = json.loads((ensemble / "metrics.json").read_text())
    assert metrics["test"]["mae"] <= np.mean(metrics["test"]["members_mae"]) + 1e-9
    assert (ensemble / "calibration_test.png").stat().st_size > 10_000


def test_calibration_knows_right_and_wrong_uncertainties():
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.1, 2, 20000)
    error = rng.normal(scale=sigma)
    right, small, large = (calibration(error, factor * sigma) for factor in (1, 0.3, 3))
    assert right["area"] < 0.01 and right["rank_correlation"] > 0.3
    assert min(small["area"], large["area"]) > 0.2
    assert right["nll"] < min(small["nll"], large["nll"])
    assert max(small["observed"]) < 0.95 and min(large["observed"]) > 0.05
    shuffled = calibration(error, rng.permutation(sigma))
    assert abs(shuffled["rank_correlation"]) < 0.05


def test_the_scale_is_that_of_the_errors():
    rng = np.random.default_rng(0)
    members = rng.normal(scale=0.5, size=(50, 4000, 2))
    labels = rng.normal(scale=[0.5, 2.0], size=(4000, 2))
    labels[::3, 1] = np.nan
    scale = fit_scale(MemberPredictions([""] * 4000, labels, members))
    np.testing.assert_allclose(scale, [1, 4], rtol=0.1)


@pytest.mark.parametrize("members", [2, 3, 5])
def test_members_that_agree_by_chance_do_not_blow_up_the_scale(members):
    """Members scatter like labels: the mean of M is off by 1 + 1/M of the spread's square."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(members, 4000, 1))
    drawn[:, 0] = drawn[0, 0]
    found = MemberPredictions([""] * 4000, rng.normal(size=(4000, 1)), drawn)
    np.testing.assert_allclose(fit_scale(found), (1 + 1 / members) ** 0.5, rtol=0.05)


def test_calibration_needs_no_new_numpy(monkeypatch):
    monkeypatch.delattr(np, "trapezoid", raising=False)  # NumPy 1.26 has none
    error = np.linspace(1, 2, 10)
    assert calibration(error, 1e-9 * error)["area"] == pytest.approx(0.475)  # none is within


def test_members_that_agree_exactly_are_no_division_by_zero():
    found = MemberPredictions(["x", "y"], np.array([[1.0], [2.0]]), np.ones((3, 2, 1)))
    assert np.isfinite(fit_scale(found)).all() and (found.spread > 0).all()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a"], "two or more different runs"),
        (["a", "a"], "two or more different runs"),
        (["a", "c"], "predicts other targets"),
        (["a", "gone"], "does not exist"),
    ],
)
def test_runs_that_make_no_ensemble(members, call, tmp_path, names, words):
    runs = ",".join(str(members / name) for name in names)
    code, _, err = call("ensemble", f"runs=[{runs}]", f"output={tmp_path / 'out'}")
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "this version reads 1"),
        ({"members": 10**9}, "members must be a whole number, from 2 to 1000"),
        ({"members": 3}, "does not exist"),
        ({"scale": [1.0, 2.0]}, "one positive number"),
        ({"scale": [-1.0]}, r"scale\[0\] must be a number, from 1e-300"),
    ],
)
def test_a_record_that_does_not_fit_its_members(ensemble, tmp_path, change, words):
    path = shutil.copytree(ensemble, tmp_path / "changed")
    record = json.loads((path / "ensemble.json").read_text()) | change
    (path / "ensemble.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=words):
        load(path)


def test_runs_judged_on_other_crystals_are_refused(members, tmp_path):
    other = shutil.copytree(members / "b", tmp_path / "b")
    lines = (other / "predictions_val.csv").read_text().splitlines()
    (other / "predictions_val.csv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="not of the crystals"):
        create([str(members / "a"), str(other)], tmp_path / "out")
    lines[-1] = lines[-1].split(",")[0] + ",99,1"
    (other / "predictions_val.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"labels of .* are not the same"):
        create([str(members / "a"), str(other)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
