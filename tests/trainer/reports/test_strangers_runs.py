"""What a run of a stranger names is not opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
