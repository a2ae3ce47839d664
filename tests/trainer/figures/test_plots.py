"""Figures: written at the promised width, right in what they say, without global side effects."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from crysforge.datapipe.schema import MAX_Z
from crysforge.trainer.figures import data_figures, plots
from crysforge.trainer.figures import style as drawing
from crysforge.trainer.figures.data_figures import histograms


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """The figures that were saved, beside their files."""
    figures: list[Figure] = []
    save = plots.save_png

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "save_png", keep)
    monkeypatch.setattr(data_figures, "save_png", keep)
    return figures


def curve(scale: float, count: int = 50) -> list[tuple[int, float]]:
    return [(s, scale * float(np.exp(-s / 20))) for s in range(1, count)]


def test_parity_plot_states_error_and_unit_and_ignores_missing_labels(tmp_path, saved):
    label = np.array([0.0, 1.0, 2.0, np.nan])
    plots.parity_plot(label, np.array([0.5, 1.5, 1.5, 9.0]), "gap", "eV", tmp_path / "p.png")
    axes = saved[0].axes[0]
    assert axes.get_title(loc="left").split("    ") == ["MAE 0.5 eV", "R² 0.625", "3 crystals"]
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlim()[1] < 9
    assert "gap (eV)" in axes.get_xlabel()
    assert Image.open(tmp_path / "p.png").width == 1200


@pytest.mark.parametrize("count", [1, 2, 5000])
def test_parity_plot_of_few_many_and_equal_points(tmp_path, saved, count):
    value = np.full(count, 3.0) if count < 5 else np.random.default_rng(0).normal(size=count)
    plots.parity_plot(value, value, "x", "", tmp_path / "p.png")
    title = saved[0].axes[0].get_title(loc="left")
    assert title.startswith("MAE 0 ")
    assert ("R² 1.000" in title) == (count == 5000)


def test_parity_plot_without_labels_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no crystal has both"):
        plots.parity_plot(np.array([np.nan]), np.array([1.0]), "gap", "eV", tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_density_counts_neighbours():
    x = np.array([0.0, 0.001, 0.9])
    assert drawing.crowding(x, x, (-0.1, 1.0)).tolist() == [2, 2, 1]


def test_learning_curves_have_a_panel_per_quantity(tmp_path, saved):
    history = {
        "train/loss": curve(1),
        "train/mse": curve(1),
        "val/mse": curve(2),
        "train/mae/gap": curve(1),
        "val/mae/gap": [*curve(2), (60, 5.0), (61, float("nan"))],
        "optim/lr": curve(1e-3),
        "speed/crystals": curve(100),
    }
    plots.learning_curves(history, tmp_path / "c.png", {"gap": "eV"})
    axes = {a.get_ylabel(): a for a in saved[0].axes}
    # the loss is the mse under a second name, speeds are not drawn
    assert set(axes) == {"MAE, gap (eV)", "mse", "learning rate"}
    assert axes["mse"].get_yscale() == "log"
    assert axes["learning rate"].get_yscale() == "linear"
    assert axes["MAE, gap (eV)"].get_title(loc="right").endswith("step 49")
    assert Image.open(tmp_path / "c.png").width == 1200


def test_loss_of_several_terms_is_drawn(tmp_path, saved):
    history = {f"train/{q}": curve(i + 1) for i, q in enumerate(["loss", "kl", "atoms", "coords"])}
    plots.learning_curves(history, tmp_path / "c.png")
    assert {a.get_ylabel() for a in saved[0].axes} == {"loss", "kl", "atoms", "coords"}


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no learning curves"):
        plots.learning_curves({"train/loss": [(1, float("nan"))]}, tmp_path / "c.png")


def test_histograms_of_a_data_set(tmp_path, saved):
    atoms = np.array([2, 2, 5, 40])
    targets = {"gap": np.array([0.0, 1.0, np.nan, 2.0]), "none": np.full(4, np.nan)}
    histograms(atoms, {11: 3, 17: 4}, targets, {"gap": "eV"}, tmp_path / "h.png")
    labels = [a.get_xlabel() for a in saved[0].axes]
    assert "atoms per cell" in labels
    assert "gap (eV)" in labels
    assert not any("none" in label for label in labels)
    drawn = {a.get_xlabel(): sum(p.get_height() for p in a.patches) for a in saved[0].axes}
    assert drawn["atoms per cell"] == 4
    assert drawn["gap (eV)"] == 3
    assert "4 crystals of 2 elements" in saved[0].axes[0].get_title(loc="left")
    assert Image.open(tmp_path / "h.png").width == 1200


def test_every_element_has_its_own_place_in_its_group():
    places = {z: drawing.place_of(z) for z in range(1, MAX_Z + 1)}
    assert len(set(places.values())) == MAX_Z
    assert all(0 <= r < 9 and 0 <= c < 18 for r, c in places.values())
    for column, members in {0: (1, 3, 87), 1: (4, 88), 2: (21, 39, 71, 103), 3: (22, 72, 104),
                            12: (5, 13, 113), 16: (9, 117), 17: (2, 10, 118)}.items():  # fmt: skip
        assert {places[z][1] for z in members} == {column}
    assert {places[z][0] for z in range(57, 71)} == {7}
    assert {places[z][0] for z in range(89, 103)} == {8}


def test_no_global_side_effects(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.learning_curves({"train/loss": curve(1)}, tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == before
    code = "import sys, crysforge.trainer.figures.plots; print('matplotlib.pyplot' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
