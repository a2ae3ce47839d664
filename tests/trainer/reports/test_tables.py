"""Tables in their three forms, published numbers, and the cost of pretraining."""

from __future__ import annotations

import csv
import io
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from crysforge.datapipe.common.files import write_json, write_text
from crysforge.launch.cluster.code import ROOT
from crysforge.models.encoders import build_encoder
from crysforge.trainer.base.command_line import read_yaml
from crysforge.trainer.evaluation.compare import arms_of
from crysforge.trainer.evaluation.published import PATH, published
from crysforge.trainer.evaluation.results import gather
from crysforge.trainer.evaluation.suite import Suite
from crysforge.trainer.reports.costs import costs_table
from crysforge.trainer.reports.formats import Interval, Number, PValue, Table, escape_latex, places
from crysforge.trainer.reports.published_tables import published_table
from crysforge.trainer.reports.tables import results_table
from crysforge.trainer.runs.model_directory import export_stage
from crysforge.trainer.stages.base import STAGES
from tests.evaluation_runs import arms_and_seeds, finetuned, suite


def table() -> Table:
    return Table(
        "t",
        "50 % of A_B",
        ["task | x", "MAE", "CI", "p"],
        [
            ["5 < N & $", Number(0.12345, 3, 0.0012, bold=True), Interval(0.1, 0.2), PValue(1e-5)],
            ["<b>", Number(float("nan")), Interval(float("nan"), 1), PValue(float("nan"))],
        ],
        notes=["A note."],
    )


def test_markdown_is_padded_and_shows_what_it_is_given():
    lines = table().markdown().splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert [c.strip() for c in lines[2].strip("|").split(" | ")] == [
        "5 < N & $", "**0.123 ± 0.001**", "[0.100, 0.200]", "< 0.001",
    ]  # fmt: skip
    assert lines[0].startswith(r"| task \| x ") and "&lt;b>" in lines[3]
    assert lines[3].count("–") == 3 and lines[-1] == "A note."


def test_csv_has_all_digits_in_columns_of_their_own():
    rows = list(csv.DictReader(io.StringIO(table().csv())))
    assert rows[0] == {
        "task | x": "5 < N & $", "MAE": "0.12345", "MAE std": "0.0012", "CI low": "0.1",
        "CI high": "0.2", "p": "1e-05",
    }  # fmt: skip
    assert set(rows[1].values()) == {"<b>", "", "1"}


def test_latex_is_escaped_and_balanced():
    text = table().latex()
    assert r"5 $<$ N \& \$ & $\mathbf{0.123} \pm 0.001$ & $[0.100, 0.200]$ & $<$ 0.001 \\" in text
    assert r"\caption{50 \% of A\_B. A note.}" in text
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")


@given(st.text(max_size=30))
def test_escaped_text_has_no_active_character(text):
    bare = escape_latex(text)
    for command in ("\\textbackslash{}", "\\textasciitilde{}", "\\textasciicircum{}", "\\AA{}"):
        bare = bare.replace(command, "")
    for character in "&%$#_{}":
        bare = bare.replace(f"\\{character}", "")
    assert not set("&%#_{}~") & set(bare)
    assert bare.count("$") % 2 == 0


def test_places_show_the_digits_that_are_asked_for():
    assert [places([x]) for x in (0.0261, 0.117, 9.55, 123.4, 12345)] == [4, 3, 2, 0, 0]
    assert places([0.5, 0.026], 2) == 3
    assert places([0.0, float("nan")]) == 3


# --- published -----------------------------------------------------------------------------------


def test_every_published_row_has_a_value_for_each_column():
    record = OmegaConf.to_container(OmegaConf.load(PATH))
    for t in record["tables"]:
        for row in t["rows"]:
            assert len(row["mae"]) == len(t["properties"]), (t["key"], row)
            assert len(row.get("std", row["mae"])) <= len(row["mae"])
    assert {p["data"] for p in record["properties"].values()} <= set(record["datasets"])
    assert {p["quantity"] for p in record["properties"].values()} <= set(record["quantities"])


def test_published_averages_are_those_that_the_paper_states():
    """4.26 % over nine properties of JARVIS and 4.90 % over four of MP (PDDFormer, CrysLDNet)."""
    (main,) = published().select("crysldnet-main").tables
    base, ours = (
        next(r for r in main.rows if r.is_of("pddformer", p)) for p in ("none", "crysldnet")
    )
    for data, stated in (("JARVIS", 4.26), ("MP 2018.6", 4.90)):
        keys = [p.key for p in main.properties if p.data == data]
        gains = [100 * (base.mae[k] - ours.mae[k]) / base.mae[k] for k in keys]
        assert sum(gains) / len(gains) == pytest.approx(stated, abs=0.005)


def test_tables_are_chosen_by_key_beginning_or_other_name():
    known = published()
    assert known.select("").tables == []
    assert [t.source for t in known.select("unified").tables] == [
        "CrysLDNet, Table 11", "CrysLDNet, Table 12",
    ]  # fmt: skip
    assert known.select("unified").costs and not known.select("dpf").costs
    assert len(known.select("crysldnet").tables) == 6
    with pytest.raises(ValueError, match=r"no published table 'crys': known are .*unified"):
        known.select("crys")


def jarvis(root, labels=44578, data="data/jarvis_formation_energy_peratom", unit="eV/atom"):
    """Arms of a suite on JARVIS formation energy."""
    arms_and_seeds(
        root, {"none": 0.03, "CrysLDNet": 0.02}, targets=["formation_energy_peratom"],
        data=data, labels=labels, unit=unit, encoder="pddformer",
    )  # fmt: skip
    found = Suite.read(root)
    return found, arms_of(found, *gather(found))


def test_published_numbers_stand_beside_runs_of_the_same_task(tmp_path):
    found, arms = jarvis(tmp_path)
    known = published().select("jarvis")
    assert known.value(arms[0], "pretraining") == (0.027, "CrysLDNet, Tables 1 and 2")
    assert known.value(arms[1], "pretraining")[0] == 0.026
    main = results_table(found, arms, [], known)
    assert main.columns[-2:] == ["none, published", "CrysLDNet, published"]
    beside = published_table(found, arms, known, known.tables[0])
    assert beside.columns[2:] == [
        "ours: formation_energy_peratom (eV/atom)", "JARVIS formation energy (eV/atom)",
    ]  # fmt: skip
    assert [r[:2] for r in beside.rows[:2]] == [["pddformer", "none"], ["pddformer", "CrysLDNet"]]
    assert beside.rows[1][3].text == "0.0260 ± 0.0004"
    assert len(beside.rows) == 20 and beside.notes == []


@pytest.mark.parametrize(
    "other", [{"labels": 20000}, {"data": "data/mine"}, {"unit": "meV/atom"}], ids=str
)
def test_other_tasks_are_not_set_on_a_par(tmp_path, other):
    found, arms = jarvis(tmp_path, **other)
    known = published().select("jarvis")
    assert known.value(arms[0], "pretraining") is None
    beside = published_table(found, arms, known, known.tables[0])
    assert any("compare the order of the rows" in note for note in beside.notes)


def test_models_are_known_by_the_papers_titles_too(tmp_path):
    runs = {}
    for name, encoder in (("PDDFormer", "pddformer"), ("CrysLDNet (Matformer)", "matformer")):
        finetuned(tmp_path / encoder, 0.03, targets=["ehull"], data="jarvis_ehull", labels=44296,
                  encoder=encoder, unit="eV/atom")  # fmt: skip
        runs[name] = {"model": name, "seed": 0, "path": encoder}
    suite(tmp_path, runs, ["model", "seed"], baseline="model=PDDFormer")
    found = Suite.read(tmp_path)
    known = published().select("jarvis")
    arms = arms_of(found, *gather(found))
    assert [known.value(a, "model")[0] for a in arms] == [0.033, 0.045]


def test_the_unified_suites_have_runs_for_every_published_row():
    suites = ROOT / "configs" / "suites"
    factors = read_yaml(suites / "unified.yaml")["factors"]
    own = read_yaml(suites / "unified_own.yaml")["factors"]["objective"]
    models = {
        "crysldnet-unified": [*itertools.product(factors["encoder"], factors["objective"])],
        "crysldnet-unified-own": [
            (values.get("encoder.name") or values["encoder"]["name"], name)
            for name, values in own.items()
        ],
    }
    tables = published().select("unified").tables
    assert [table.key for table in tables] == list(models)
    for table in tables:
        for row in table.rows:
            assert any(row.is_of(*model) for model in models[table.key]), row.title


# --- costs ---------------------------------------------------------------------------------------


def test_costs_count_views_once_and_say_what_did_not_finish(tmp_path):
    encoder = build_encoder({"name": "cgcnn", "tiny": True})
    stages = {}
    for name in ("crystal_twins", "crysxpp"):
        stages[name] = STAGES[name](STAGES[name].Config(), encoder)
        export_stage(tmp_path / name / name, stages[name], stages[name].state_dict(), {})
        run = {"identity": {"stages": [name]}, "finished": [name] if name != "crysxpp" else []}
        write_json(tmp_path / name / "run.json", run)
        lines = [
            {"stage": name, "step": s, "speed/crystals_per_s": 300.0, "speed/steps_per_s": 2.0,
             "memory/peak_gb": 0.1 * s} for s in (10, 20)
        ]  # fmt: skip
        write_text(tmp_path / name / "metrics.jsonl", "\n".join(map(json.dumps, lines)))
    runs = {n: {"pretraining": n, "job": "pretrain"} for n in (*stages, "dpf")}
    suite(tmp_path, runs, ["pretraining", "seed"], baseline=None)
    found = costs_table(Suite.read(tmp_path), published().select("unified").costs)
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    twins, xpp, dpf = rows[:3]
    total = sum(p.numel() for p in stages["crystal_twins"].parameters())
    assert int(twins["parameters"]) == total
    assert int(twins["of the encoder"]) == sum(p.numel() for p in encoder.parameters())
    assert (twins["crystals/s"], xpp["crystals/s"]) == ("150", "300")
    assert (twins["steps"], twins["peak memory / MB"]) == ("20", "2000")
    assert float(twins["minutes"]) == pytest.approx(20 / 2 / 60)
    assert xpp["stage"] == "crysxpp (not finished)" and dpf["stage"] == "not started"
    assert rows[-1]["peak memory / MB"] == "15842"  # DPF, as published
