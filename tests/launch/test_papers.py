"""A paper's tables and figures, each with the command that makes it: `evaluate paper=NAME`."""

from __future__ import annotations

import pytest

from crysforge.launch.cluster.code import ROOT
from crysforge.trainer.evaluation.exhibits import exhibits, papers
from crysforge.trainer.evaluation.published import published
from tests.evaluation_runs import arms_and_seeds
from tests.house.test_docs import check, commands


@pytest.mark.parametrize("paper", papers())
def test_every_exhibit_is_made_by_what_there_is_or_says_what_lacks(paper):
    known = {table.key for table in published().tables}
    for shown in exhibits(paper):
        assert shown.suite or shown.command or shown.lacks, shown.exhibit
        assert set(shown.tables or []) <= known
        if shown.suite:
            assert (ROOT / "configs" / "suites" / f"{shown.suite}.yaml").is_file()
        for command in shown.commands("runs"):
            for script, words in commands(command):
                check(script, words)


def test_no_published_table_is_left_out():
    shown = {key for paper in papers() for e in exhibits(paper) for key in e.tables or []}
    assert shown == {table.key for table in published().tables}


def test_ours_stand_beside_theirs(call, tmp_path):
    data = {"data": "data/jarvis_mbj", "labels": 14537, "targets": ("mbj_bandgap",)}
    arms_and_seeds(tmp_path / "runs" / "dpf", {"none": 0.4, "dpf mask 30": 0.2}, **data)
    (tmp_path / "runs" / "dpf" / "none-1" / "run.json").unlink()
    code, said, _ = call("evaluate", "paper=dpf", f"runs={tmp_path}/runs", f"data_dir={tmp_path}")
    assert code == 0
    assert (
        f"submit.py suite=configs/suites/dpf.yaml data_dir=data output={tmp_path}/runs/dpf" in said
    )
    assert "Data sets: 0 of 9 are here; missing: gnome, jarvis_formation" in said
    assert f"Runs: 5 of 6 finetunings in {tmp_path}/runs/dpf have finished." in said
    (head,) = (x for x in said.splitlines() if x.startswith("| encoder"))
    assert [x.strip() for x in head.split("|")][3:5] == [
        "ours: mbj_bandgap (eV)", "JARVIS MBJ band gap (eV)",
    ]  # fmt: skip
    rows = {tuple(y.strip() for y in x.split("|"))[1:] for x in said.splitlines() if x[:2] == "| "}
    published_row = next(r for r in rows if r[1] == "dpf mask 70")
    assert published_row[2:4] == ("–", "0.316")
    assert any(r[1] == "dpf mask 30" and r[2].startswith("0.2") for r in rows)
    (tmp_path / "gnome").mkdir()
    (tmp_path / "gnome" / "manifest.json").write_text("{}")
    _, said, _ = call("evaluate", "paper=dpf", f"runs={tmp_path}/none", f"data_dir={tmp_path}")
    assert "Data sets: 1 of 9 are here" in said and f"Runs: none in {tmp_path}/none/dpf." in said


def test_an_unknown_paper_is_named(call):
    code, _, err = call("evaluate", "paper=crysldnt")
    assert code == 2 and "did you mean 'crysldnet'" in err
