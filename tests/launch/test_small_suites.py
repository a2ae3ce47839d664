"""One of the papers' suites run to its end in small; `python tests/suites.py DIR` runs them all."""

from __future__ import annotations

import pytest

from tests import suites


def test_a_suite_goes_from_pretraining_to_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [])  # given back afterwards
    report = suites.small_suite("costs", tmp_path)
    assert "2 of 2 finetunings have finished" in (report / "report.md").read_text()
    costs = (report / "tables" / "costs.md").read_text()
    for line in ("| crysldnet ", "| dpf ", "CrysLDNet, Table 8"):
        assert line in costs
    assert "# pretrain" not in capsys.readouterr().out


@pytest.mark.parametrize("name", suites.SUITES)
def test_the_others_are_known_by_their_runs_and_labels(name):
    plan = suites.merged(suites.ROOT / "configs" / "suites" / f"{name}.yaml")
    assert plan["data"] and plan["runs"] and plan["labels"]
