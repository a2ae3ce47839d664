"""Names that people give to properties, in files, tensors, tags, config keys, columns, tables."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crysforge.datapipe.common.escape import code_span, from_cell
from crysforge.datapipe.common.safe_names import (
    check_names,
    file_part,
    in_markdown,
    slugs,
)
from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.datapipe.storage.manifest import Target
from crysforge.launch.cluster.planning import sweep
from crysforge.launch.cluster.planning.request import Request
from crysforge.models.encoders import build_encoder
from crysforge.trainer.base.command_line import from_sources, to_yaml
from crysforge.trainer.base.distributed import World
from crysforge.trainer.evaluation.results import _read_predictions
from crysforge.trainer.figures import plots
from crysforge.trainer.figures.data_figures import histograms
from crysforge.trainer.figures.style import with_unit
from crysforge.trainer.jobs.finetuning import scores_of, summary
from crysforge.trainer.jobs.schemas import FinetuneJob
from crysforge.trainer.jobs.tables import write_predictions
from crysforge.trainer.loop.guards import dump_batch, load_batch
from crysforge.trainer.reports.formats import Table
from crysforge.trainer.runs.card import model_card
from crysforge.trainer.runs.logger import Logger, read_metrics
from crysforge.trainer.runs.model_directory import Scaler, describe_stage, read_model
from crysforge.trainer.serving.ensemble import read_predictions
from crysforge.trainer.stages.finetune import FinetuneConfig, FinetuneStage
from tests.launching import FINETUNE

NASTY = [
    "formation energy (eV/atom)", "E/N", "/abs", "../up", "..", ".", "gap.pbe", "-gap", "--help",
    "Δ_hull", "Δ-hull", "能隙", "磁矩", "😀",
    "Young's modulus", 'the "gap"', "a,b;c", "a: b", "x=1",
    "x=1=2", "[gap]", "{gap}", "gap #1", "100 %", "$E_f$", "$\\bad", "a|b", "a\\b", "*star*", "`c`",
    "~", "null", "yes", "1e5", "007", "mae", "val", "id", "loss", "step", "stage", "train/mae",
    "_gap", "Gap", "gap", "GAP", "!tag", "&x", "*x", "@x", "%x", "CON", "<b>", "a\u00a0b",
    "long " * 30 + "name", "long " * 30 + "other",
]  # fmt: skip
"""What a header may hold; some differ in case, or in what file names leave out, alone."""


@pytest.mark.parametrize("name", NASTY)
def test_configs_hold_any_name(name):
    check_names([name])
    quoted = json.dumps(name, ensure_ascii=False)
    for given in (f"targets=[{quoted}]", f"targets=[other,{quoted}]"):
        units = [f"units={{{quoted}: eV/atom}}", f"filters.labels={{{quoted}: [0, 2]}}"]
        config = from_sources(PrepareConfig, [], [given, *units])
        assert config.targets[-1] == name and config.units == {name: "eV/atom"}
        assert config.filters.labels == {name: [0, 2]}
        plain = [f"units.{name}=eV/atom", f"filters.labels.{name}=[0,2]"]
        assert from_sources(PrepareConfig, [], [given, *plain]) == config
    job = ["data=d", "run_dir=r"]
    made = from_sources(FinetuneJob, [], [*job, f"target={quoted}"])
    assert made.targets == [name]
    if name[0] not in "[{" and name not in ("null", "~"):
        assert from_sources(FinetuneJob, [], [*job, f"target={name}"]) == made


def test_configs_of_runs_are_read_back(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(FinetuneJob(data="d", run_dir="r", targets=NASTY)), encoding="utf-8")
    assert from_sources(FinetuneJob, [str(path)]).targets == NASTY
    units = dict.fromkeys(NASTY, "eV")
    path.write_text(to_yaml(PrepareConfig(targets=NASTY, units=units)), encoding="utf-8")
    assert from_sources(PrepareConfig, [str(path)]).units == units


@pytest.mark.parametrize(
    "given", ["[a: b]", "[gap #1]", "[a[0]]", "[a,", "[{a}]", "[[a]]", "[a b]]"]
)
def test_lists_that_need_quotes_say_so(given):
    with pytest.raises(ValueError, match=r"targets=.*cannot tell its parts apart; put names .* in"):
        from_sources(PrepareConfig, [], [f"targets={given}"])


def test_submitted_jobs_and_sweeps_take_any_name(tmp_path):
    given = ["job=finetune", f"run_dir={tmp_path}/r", "data=d", "encoder.name=cgcnn"]
    (planned,) = Request.parse([*given, "target=E: 1e5 (eV)"], None).runs()
    assert planned.config["target"] == "E: 1e5 (eV)"
    runs = sweep.read_sweep('[target=[Young\'s modulus,E/N,"a,b",能隙,磁矩,gap,Gap],seed=[0,1]]')
    assert [c["target"] for c in runs[::2]] == [
        "Young's modulus", "E/N", "a,b", "能隙", "磁矩", "gap", "Gap"
    ]  # fmt: skip
    names = sweep.names(runs)
    assert len({n.lower() for n in names}) == len(runs)
    assert all(re.fullmatch(r"[A-Za-z0-9._+=,-]+", n) for n in names)


def test_mappings_by_name_in_a_file_of_runs(tmp_path):
    path = tmp_path / "sweep.yaml"
    runs = [{"units": {"E (eV, 0.1 K)": "eV", "[b]": "K"}, "loader": {"workers": 0}}]
    path.write_text(yaml.safe_dump(runs), encoding="utf-8")
    (planned,) = sweep.read_sweep(str(path))
    assert sweep.merge({"targets": ["[b]"]}, planned) == {"targets": ["[b]"], **runs[0]}


def test_parts_of_file_names_are_safe_and_differ():
    parts = slugs(NASTY)
    assert len({part.casefold() for part in parts}) == len(NASTY)
    for part in parts:
        assert re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*", part) and len(part) <= 60
    assert slugs(["formation energy (eV/atom)", "gap"]) == ["formation-energy-eV-atom", "gap"]
    assert file_part("a/b c") == "a-b-c"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is empty"),
        ("a\nb", "has a control character"),
        ("a\tb", "has a control character"),
        ("a\x7f", "has a control character"),
        ("a\u2028b", "has a line separator"),
        ("a\ud800", "has half a character"),
        (" gap", "starts or ends with a space"),
        ("x" * 201, "has 201 characters, 200 are the most"),
        ("${oc.env:HOME}", "which configs take for a reference"),
    ],
)
def test_what_no_name_may_have_is_told_before_anything_is_made(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        PrepareConfig(input="a.csv", output=str(tmp_path / "out"), targets=[name])
    with pytest.raises(ValueError, match=words):
        DatasetWriter(tmp_path / "out", [name])
    with pytest.raises(ValueError, match=words):
        FinetuneJob(data="d", run_dir=str(tmp_path / "out"), targets=[name])
    assert not list(tmp_path.iterdir())


# What is written


def crystals(count=6):
    for i, crystal in zip(range(count), prototypes(size=200, seed=0), strict=False):
        yield crystal.with_targets(dict.fromkeys(NASTY, i + 0.5))


def test_data_sets_and_batches(tmp_path):
    units = dict.fromkeys(NASTY, "eV")
    with DatasetWriter(tmp_path / "set", NASTY, units) as writer:
        for crystal in crystals():
            writer.add("train", crystal)
        writer.finish({})
    dataset = Dataset.open(tmp_path / "set")
    assert dataset.names == NASTY
    found = [crystal for _, crystal in dataset.read(range(6))]
    assert [dict(c.targets) for c in found] == [dict(c.targets) for c in crystals()]
    batch = build(found, build_encoder({"name": "cgcnn", "tiny": True}).graph, NASTY)
    dump_batch(tmp_path / "batch.safetensors", batch)
    again = load_batch(tmp_path / "batch.safetensors")
    assert list(again.targets) and set(again.targets) == set(NASTY)
    assert all((again.targets[n] == batch.targets[n]).all() for n in NASTY)


def test_predictions(tmp_path):
    rng = np.random.default_rng(0)
    label, prediction = rng.random((2, 5, len(NASTY)))
    ids = ["a", "b/c", "d,e", 'f"g', "h\ni"]
    for run in ("r0", "r1"):
        (tmp_path / run).mkdir()
        path = tmp_path / run / "predictions_val.csv"
        write_predictions(path, NASTY, ids, label, prediction)
    found = read_predictions([tmp_path / "r0", tmp_path / "r1"], "val", NASTY)
    assert found.ids == ids
    np.testing.assert_allclose(found.members[0], prediction, rtol=1e-6)
    for i, name in enumerate(NASTY):
        one = _read_predictions(path, f"_{name}")
        np.testing.assert_allclose(one.label, label[:, i], rtol=1e-6)
        np.testing.assert_allclose(one.prediction, prediction[:, i], rtol=1e-6)


def test_logs_and_tensorboard(tmp_path):
    values = {f"val/mae/{name}": float(i) for i, name in enumerate(NASTY)}
    logger = Logger(tmp_path, "finetune", 0, 1, World(0, 1, 0, "cpu"))
    logger.scalars(1, values)
    logger.close()
    assert read_metrics(tmp_path, "finetune") == {k: [(1, v)] for k, v in values.items()}
    events = EventAccumulator(str(tmp_path / "tensorboard" / "finetune"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert len(tags) == len(NASTY)
    assert sorted(events.Scalars(tag)[0].value for tag in tags) == sorted(values.values())


def test_model_files_and_their_card(tmp_path):
    encoder = build_encoder({"name": "cgcnn", "tiny": True})
    n = len(NASTY)
    stage = FinetuneStage(FinetuneConfig(), encoder, NASTY, [0.0] * n, [1.0] * n)
    scaler = Scaler(NASTY, ["eV|Å"] * n, [0.0] * n, [1.0] * n)
    data = {"targets": {name: asdict(Target("eV", 0.0, 1.0, {"train": 2})) for name in NASTY}}
    describe_stage(tmp_path, stage, data, scaler)
    model = read_model(tmp_path)
    assert model.scaler is not None and model.scaler.targets == NASTY
    assert list(model.data["targets"]) == NASTY
    config = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    scores = {"n": 1, "mae": 1.0, "rmse": 1.0, "r2": 0.0}
    config |= {"results": {"test": dict.fromkeys(NASTY, scores)}, "license": "", "checkpoint": ""}
    config |= {"parameters": {"encoder": 1, "total": 2}, "training": {}}
    card = model_card("m", config, scaler)
    rows = [line for line in card.splitlines() if "| test | 1 |" in line]
    assert len(rows) == n
    for name, row in zip(NASTY, rows, strict=True):
        assert len(re.findall(r"(?<!\\)\|", row)) == 7, row
        assert code_span(name) in row


def test_reports_find_the_scores_of_a_target_called_mae(tmp_path):
    scores = {name: {"n": 1, "mae": float(i)} for i, name in enumerate(NASTY)}
    metrics = {"targets": NASTY, "units": dict.fromkeys(NASTY, "eV"), "test": scores}
    assert scores_of(metrics, "test", "mae") == scores["mae"]
    text = summary(metrics, tmp_path)
    assert all(f"test MAE of {name}: " in text for name in NASTY)


def test_tables_in_markdown_and_latex():
    table = Table("t", "T", ["target", "MAE"], [[name, 1] for name in NASTY])
    lines = table.markdown().splitlines()
    assert len(lines) == 2 + len(NASTY)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines)
    for line in table.latex().splitlines():
        assert not line.startswith("["), "an option of the line end before it"
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert [from_cell(name) for name, _ in rows[1:]] == NASTY
    assert in_markdown("mean_label _x_") == "mean_label \\_x\\_"


@pytest.mark.parametrize("name", ["$E_f$", "$\\bad", "能隙 $", "_gap", "a\\b $x^2$", NASTY[-1]])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_figures_show_names_as_they_are(tmp_path, name):
    x = np.arange(9.0)
    plots.parity_plot(x, x + 1, name, "$/mol", tmp_path / "p.png")
    history = {"train/mse": [(1, 1.0), (2, 0.5)], f"val/mae/{name}": [(1, 1.0), (2, 0.5)]}
    plots.learning_curves(history, tmp_path / "c.png", {name: "eV"})
    histograms(np.arange(1, 10), {1: 3}, {name: x}, {name: "eV"}, tmp_path / "h.png")
    assert {p.name for p in tmp_path.iterdir()} == {"p.png", "c.png", "h.png"}
    assert len(with_unit(name, "eV")) < 70


# The whole way

TWO = ["formation energy (eV/atom)", "mae"]


def test_from_a_table_to_an_exported_model(tmp_path, call):
    """Names that a finetuning could not end with: everything is made, and read again."""
    source = tmp_path / "crystals.csv"
    with open(source, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "cif", *TWO])
        for i, crystal in zip(range(60), prototypes(size=200, seed=1), strict=False):
            structure = crystal.to_pymatgen()
            row = [float(structure.density), structure.volume / len(structure)]
            writer.writerow([f"c{i}", structure.to(fmt="cif"), *row])
    names = json.dumps(TWO)
    data = tmp_path / "data"
    code, out, err = call(
        "prepare", f"input={source}", f"output={data}", f"targets={names}", "progress=false",
        f"units={{{json.dumps(TWO[0])}: eV/atom, mae: Å³}}", "workers=1",
    )  # fmt: skip
    assert code == 0, err
    assert f"target {TWO[0]}: 60 labelled" in out and "eV/atom" in out
    runs = []
    for seed in (0, 1):
        runs.append(tmp_path / "suite" / f"run{seed}")
        code, out, err = call(
            "finetune", *FINETUNE, f"data={data}", f"run_dir={runs[-1]}", "init_from=none",
            f"targets={names}", f"seed={seed}",
        )  # fmt: skip
        assert code == 0, err
        assert f"test MAE of {TWO[0]}: " in out
        made = {p.name for p in runs[-1].glob("parity_*")}
        assert made == {
            f"parity_{split}_{part}.png"
            for split in ("val", "test")
            for part in ("formation-energy-eV-atom", "mae")
        }
        code, out, err = call("finetune", *FINETUNE, f"data={data}", f"run_dir={runs[-1]}",
                              "init_from=none", f"targets={names}", f"seed={seed}")  # fmt: skip
        assert code == 0 and "already finished" in out
    both = tmp_path / "both"
    code, out, err = call("ensemble", f"runs=[{runs[0]},{runs[1]}]", f"output={both}")
    assert code == 0, err
    assert (both / "calibration_test_formation-energy-eV-atom.png").is_file()
    code, out, err = call("export", f"checkpoint={runs[0]}", f"output={tmp_path / 'model'}")
    assert code == 0, err
    predictions = {}
    for name, checkpoint in (("run", runs[0]), ("both", both), ("model", tmp_path / "model")):
        path = tmp_path / f"{name}.csv"
        code, out, err = call("predict", f"checkpoint={checkpoint}", f"input={source}",
                              f"output={path}", "workers=1")  # fmt: skip
        assert code == 0, err
        with open(path, newline="", encoding="utf-8") as file:
            predictions[name] = list(csv.DictReader(file))
    assert predictions["run"] == predictions["model"]
    assert f"prediction_{TWO[0]}" in predictions["both"][0]
    assert f"uncertainty_{TWO[1]}" in predictions["both"][0]
    code, out, err = call("evaluate", f"suite={tmp_path / 'suite'}", "resamples=50",
                          "space_groups=false")  # fmt: skip
    assert code == 0, err
    report = (tmp_path / "suite" / "report" / "report.md").read_text(encoding="utf-8")
    assert TWO[0] in report
    figures = {p.name for p in (tmp_path / "suite" / "report" / "figures").iterdir()}
    assert "parity-formation-energy-eV-atom.png" in figures
    assert all(name in report for name in figures)
    code, out, err = call("submit", f"status={tmp_path / 'suite'}")
    assert code == 0, err
