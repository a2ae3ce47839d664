"""What a run of a stranger names is not opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crysforge.launch.evaluate import find
from crysforge.trainer.reports.report import EvaluateConfig, evaluate
from tests.evaluation_runs import arms_and_seeds, dataset
from tests.serving import serve


def evaluated(root: Path, **settings: Any) -> str:
    config = EvaluateConfig(suite=str(root), figures=False, resamples=10, **settings)
    return (evaluate(find(root), config).path / "report.md").read_text()


def test_a_runs_address_is_opened_only_below_one_that_is_typed(tmp_path):
    fingerprint = dataset(tmp_path / "sets" / "a", count=8)
    with serve(tmp_path / "sets") as server:
        url = f"{server.url}/a"
        runs = {"data": url, "fingerprint": fingerprint, "count": 8}
        root = arms_and_seeds(tmp_path / "suite", {"none": 0.2, "x": 0.1}, seeds=(0, 1), **runs)
        for settings in ({}, {"data_dir": "http://127.0.0.1"}, {"data_dir": f"{server.url}/b"}):
            page = evaluated(root, **settings)
            assert "which is not opened unless you say so" in page and not server.asked
        for settings in ({"data_dir": server.url}, {"data_dir": url}, {"data": [url]}):
            page = evaluated(root, **settings)
            assert "by number of atoms" in page and server.asked


def test_no_link_of_a_suite_makes_another_directory_its_report(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.md").write_text("my thesis")
    root = arms_and_seeds(tmp_path / "suite", {"none": 0.2, "x": 0.1}, seeds=(0, 1))
    (root / "report").symlink_to(mine)
    with pytest.raises(ValueError, match="report leads out of"):
        evaluated(root)
    assert (mine / "report.md").read_text() == "my thesis"
    evaluated(root, output=str(tmp_path / "link"))
    (tmp_path / "again").symlink_to(tmp_path / "link")
    evaluated(root, output=str(tmp_path / "again"))  # a link of one's own


def test_a_folder_with_more_than_a_report_is_not_replaced(tmp_path):
    root = arms_and_seeds(tmp_path / "suite", {"none": 0.2, "x": 0.1}, seeds=(0, 1))
    evaluated(root)
    evaluated(root)
    (root / "report" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="report is there and is no report"):
        evaluated(root)
    assert (root / "report" / "thesis.tex").read_text() == "mine"
