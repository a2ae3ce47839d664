"""Composition-only baselines: features, the ridge solution, the choice of its penalty."""

from __future__ import annotations

import numpy as np
import pytest

from crysforge.trainer.jobs.baselines import PENALTIES, baselines, composition_features, ridge


def random_part(rng: np.random.Generator, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Crystals of eight elements whose label is linear in the composition, in eV."""
    numbers = [rng.integers(3, 11, size=rng.integers(1, 12)).astype(np.uint8) for _ in range(count)]
    value = np.linspace(-300.0, 500.0, 119)
    return numbers, np.array([value[z].mean() for z in numbers]) + 7


def test_features_are_element_fractions():
    features = composition_features([np.array([1, 1, 8], dtype=np.uint8), np.array([118])])
    assert features.shape == (2, 118)
    assert features[0, 0] == pytest.approx(2 / 3)
    assert features[0, 7] == pytest.approx(1 / 3)
    assert features[1, 117] == 1
    assert np.allclose(features.sum(1), 1)
    assert composition_features([]).shape == (0, 118)


def test_ridge_is_the_minimum_of_its_objective():
    rng = np.random.default_rng(0)
    x, y, penalty = rng.normal(size=(40, 6)), rng.normal(size=40) + 3, 0.1

    def objective(weights, intercept):
        return ((y - x @ weights - intercept) ** 2).mean() + penalty * (weights**2).sum()

    weights, intercept = ridge(x, y, penalty)
    best = objective(weights, intercept)
    for _ in range(100):
        step = 1e-3 * rng.normal(size=7)
        assert objective(weights + step[:6], intercept + step[6]) > best


def test_linear_labels_are_found_and_the_mean_is_the_mean():
    rng = np.random.default_rng(1)
    train, val, test = (random_part(rng, n) for n in (200, 50, 60))
    mae = baselines(train, val, test)
    assert mae["ridge"] < 1e-2
    assert mae["mean"] == pytest.approx(np.abs(test[1] - train[1].mean()).mean())


def test_errors_scale_and_do_not_shift_with_the_labels():
    """The same errors in other units: the penalty does not depend on the scale of the labels."""
    rng = np.random.default_rng(2)
    parts = [random_part(rng, n) for n in (30, 20, 20)]
    parts = [(z, y + rng.normal(0, 50, len(y))) for z, y in parts]
    plain = baselines(*parts)
    scaled = baselines(*[(z, 1000 * y - 4e5) for z, y in parts])
    assert scaled == pytest.approx({k: 1000 * v for k, v in plain.items()})


def test_the_penalty_is_chosen_on_validation():
    """With noise and few labels the unpenalised fit is bad; validation notices."""
    rng = np.random.default_rng(3)
    noise = [rng.integers(1, 90, size=(n, 4)) for n in (60, 200, 200)]
    parts = [(list(z), rng.normal(size=len(z))) for z in noise]
    x, y = composition_features(parts[0][0]), parts[0][1]
    weights, intercept = ridge(x, y, PENALTIES[0])
    loose = np.abs(composition_features(parts[2][0]) @ weights + intercept - parts[2][1]).mean()
    assert baselines(*parts)["ridge"] < 0.9 * loose


def test_missing_labels_do_not_count():
    rng = np.random.default_rng(4)
    parts = [random_part(rng, n) for n in (50, 20, 20)]
    with_gaps = [([*z, np.array([5])], np.append(y, np.nan)) for z, y in parts]
    assert baselines(*with_gaps) == baselines(*parts)


def test_no_validation_labels_is_fine_and_no_training_labels_is_an_error():
    rng = np.random.default_rng(5)
    train, test = random_part(rng, 50), random_part(rng, 20)
    assert baselines(train, ([], np.array([])), test)["ridge"] < 0.1
    with pytest.raises(ValueError, match="training part has no labels"):
        baselines((train[0], np.full(50, np.nan)), test, test)
    with pytest.raises(ValueError, match="3 crystals and 2 labels in the test part"):
        baselines(train, test, (test[0][:3], test[1][:2]))
