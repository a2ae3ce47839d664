"""Figures of reports: drawn from any shape of suite, the same bytes again, true to their data."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from crysforge.trainer.evaluation.compare import arms_of
from crysforge.trainer.evaluation.results import gather
from crysforge.trainer.evaluation.suite import Suite
from crysforge.trainer.reports import bars as bar_figures
from crysforge.trainer.reports import crystal_figures, figures
from crysforge.trainer.reports.bars import bars
from crysforge.trainer.reports.crystals import Facts
from crysforge.trainer.reports.report import _stage2
from tests.evaluation_runs import arms_and_seeds, finetuned, suite


def arms_at(root):
    found = Suite.read(root)
    arms = arms_of(found, *gather(found))
    return arms, figures.ArmStyle(found, arms)


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved."""
    kept: list[Figure] = []
    save = figures.save

    def keep(figure, path):
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save", keep)
    monkeypatch.setattr(crystal_figures, "save", keep)
    monkeypatch.setattr(bar_figures, "save", keep)
    return kept


def facts(count: int = 40) -> Facts:
    elements = np.zeros((count, 119), dtype=bool)
    elements[:, 8] = True
    elements[: count // 4, 26] = True
    groups = np.where(np.arange(count) % 2 == 0, 225, 14)
    row = {f"test-{i}": i for i in range(count)}
    return Facts(row, 1 + np.arange(count) % 12, elements, groups)


def test_curves_show_every_arm_over_its_labels(tmp_path, saved):
    runs = {}
    for labels in (100, 200, 400):
        for arm in ("none", "a"):
            for seed in range(3 if arm == "a" else 1):
                name = f"{arm}-{labels}-{seed}"
                finetuned(tmp_path / name, 5 / labels, seed, labels=labels)
                runs[name] = {"label_fraction": labels / 400, "pretraining": arm, "seed": seed}
    suite(tmp_path, runs, ["label_fraction", "pretraining", "seed"])
    arms, look = arms_at(tmp_path)
    figures.label_curves({"gap": arms}, look, tmp_path / "c", 0.95)
    axes = saved[0].axes[0]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 3 and
             line.get_marker() in ("X", "o")]  # fmt: skip
    assert [list(line.get_xdata()) for line in lines] == [[100, 200, 400]] * 2
    means = [a.summary().mean for a in arms if a.values["pretraining"] == "a"]
    assert lines[1].get_ydata() == pytest.approx(means)
    assert len(axes.collections) == 1  # a band where there are three seeds
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_bars_are_the_means_and_name_the_gain(tmp_path, saved):
    arms, look = arms_at(arms_and_seeds(tmp_path, {"none": 0.2, "a": 0.1, "b": 0.3}))
    bars({"gap": arms}, look, tmp_path / "b", 0.95, "By pretraining")
    axes = saved[0].axes[0]
    means = [a.summary().mean for a in arms]
    assert [p.get_width() for p in axes.patches] == pytest.approx(means)
    texts = [t.get_text() for t in axes.texts]
    assert "(−50.0 %)" in texts[1] and "(+50.0 %)" in texts[2] and "%" not in texts[0]
    assert axes.get_xlim()[0] == 0


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parity_has_a_panel_for_each_arm_up_to_six(tmp_path, saved, count):
    errors = {"none": 0.2, **{f"a{i}": 0.1 + 0.01 * i for i in range(count - 1)}}
    arms, look = arms_at(arms_and_seeds(tmp_path, errors, seeds=(0,)))
    figures.parity(arms, "gap", look, tmp_path / "p")
    titles = [a.get_title(loc="left") for a in saved[0].axes if a.get_title(loc="left")]
    assert len(titles) == min(count, 6)
    assert titles[0].startswith("pretraining: none\nMAE ")


def test_errors_by_atoms_and_groups_are_means_of_their_crystals(tmp_path, saved):
    arms, look = arms_at(arms_and_seeds(tmp_path, {"none": 0.2, "a": 0.1}))
    known = facts()
    crystal_figures.by_atoms(arms, known, "gap", look, tmp_path / "n")
    crystal_figures.by_space_group(arms, known, "gap", look, tmp_path / "g")
    errors = np.array([[r.predictions.error_of[i] for i in known.row]
                       for r in arms[1].results.values()])  # fmt: skip
    left, _, counts = saved[0].axes
    heights = [p.get_height() for p in left.patches]
    assert heights[3] == pytest.approx(errors[:, known.atoms <= 5].mean())
    assert sum(p.get_height() for p in counts.patches) == 40
    systems = saved[1].axes[0]
    assert [t.get_text() for t in systems.get_xticklabels()] == ["monoclinic\n20", "cubic\n20"]
    assert systems.patches[3].get_height() == pytest.approx(errors[:, ::2].mean())


def test_crystals_too_few_for_any_group_are_drawn(tmp_path, saved):
    arms, look = arms_at(arms_and_seeds(tmp_path, {"none": 0.2, "a": 0.1}))
    crystal_figures.by_space_group(arms, facts(4), "gap", look, tmp_path / "g")
    assert not any(axes.patches for axes in saved[0].axes)


def test_elements_show_error_and_gain(tmp_path, saved):
    arms, look = arms_at(arms_and_seeds(tmp_path, {"none": 0.2, "a": 0.1}))
    crystal_figures.by_element(arms, facts(), "gap", look, tmp_path / "e")
    upper, lower = saved[0].axes[:2]
    shown = [t.get_text() for t in lower.texts if re.fullmatch(r"[+−]\d+", t.get_text())]
    assert shown == ["+50", "+50"]
    assert len([t for t in upper.texts if t.get_text()[0].isdigit()]) == 2


def test_a_suite_that_compares_nothing_is_drawn(tmp_path, saved):
    finetuned(tmp_path / "x", 0.1)
    suite(tmp_path, {"x": {"seed": 0}}, ["seed"], baseline=None)
    arms, look = arms_at(tmp_path)
    figures.parity(arms, "gap", look, tmp_path / "p")
    crystal_figures.by_element(arms, facts(), "gap", look, tmp_path / "e")
    crystal_figures.by_atoms(arms, facts(), "gap", look, tmp_path / "n")
    assert len(saved) == 3


def test_flow_losses_of_all_runs_of_stage_2_are_in_one_figure(tmp_path, saved):
    """Of those that have a log; none is drawn for one alone."""
    logs = {"both": [(1, 5.4), (2, 0.88), (300, 0.003)], "flow alone": [(1, 1.4), (300, 1.7e-4)]}
    cells = {name: {"job": "pretrain", "pretraining": name} for name in [*logs, "not begun"]}
    for name, points in logs.items():
        (tmp_path / name).mkdir()
        lines = [{"stage": "joint", "step": s, "train/flow": v, "seconds": 1.0} for s, v in points]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    suite(tmp_path, cells, ["pretraining"], baseline=None)
    found = Suite.read(tmp_path)
    (drawn,) = _stage2(found, tmp_path)
    (axes,) = saved[0].axes
    assert [line.get_label() for line in axes.lines] == list(logs) and axes.get_yscale() == "log"
    for line, points in zip(axes.lines, logs.values(), strict=True):
        assert list(zip(*line.get_data(), strict=True)) == points
    labels = [t.get_text() for t in axes.get_yticklabels() if t.get_text()]
    assert labels and not any("mathdefault" in label for label in labels)
    assert (tmp_path / f"{drawn.name}.png").is_file()
    (tmp_path / "both" / "metrics.jsonl").unlink()
    assert _stage2(found, tmp_path) == [] and len(saved) == 1


def test_the_same_figure_has_the_same_bytes_and_no_date(tmp_path):
    arms, look = arms_at(arms_and_seeds(tmp_path, {"none": 0.2, "a": 0.1}))
    for name in ("one", "two"):
        bars({"gap": arms}, look, tmp_path / name, 0.95, "By pretraining")
    for kind in ("svg", "png"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()
    assert "dc:date" not in (tmp_path / "one.svg").read_text()


def test_names_with_dots_keep_them(tmp_path):
    arms, look = arms_at(arms_and_seeds(tmp_path, {"none": 0.2}, seeds=(0,)))
    bars({"gap": arms}, look, tmp_path / "bars-label_fraction-0.2", 0.95, "x")
    assert (tmp_path / "bars-label_fraction-0.2.png").is_file()
