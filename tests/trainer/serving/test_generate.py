"""From pretraining to ranked files, for each generative stage; kills, ranks and refusals."""

from __future__ import annotations

import csv
import json
import random
import sys

import numpy as np
import pytest
import yaml
from ase.io import read
from pymatgen.core import Structure

from crysforge import load
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.launch import generate, pretrain
from crysforge.trainer.generation.config import GenerateConfig
from crysforge.trainer.generation.work import Chunks, unless_absurd
from crysforge.trainer.serving.generate import Generation

SMALL = ["loader.workers=0", "encoder.width=16", "encoder.layers=1", "encoder.frequencies=4"]
CSP = [
    "--config=pretrain/csp_tiny", *SMALL, "csp.max_steps=3", "csp.batch_size=16",
    "csp.sampling.steps=4",
]  # fmt: skip
AB_INITIO = [
    "--config=pretrain/ab_initio", *SMALL, "ab_initio.max_steps=3", "ab_initio.batch_size=16",
    "ab_initio.timesteps=8", "ab_initio.sampling.steps=8", "trainer.precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """A run of each stage."""
    root, argv = tmp_path_factory.mktemp("generative"), sys.argv
    try:
        for name, args in (("csp", CSP), ("ab_initio", AB_INITIO)):
            sys.argv = ["pretrain", *args, f"data={data}", f"run_dir={root}/{name}"]
            pretrain.main()
    finally:
        sys.argv = argv
    return root


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def content(folder):
    """What is written that does not tell the time."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("report.json", "request.json")
    }


def an_element(made):
    """Symbols that the model has learned from."""
    from ase.data import chemical_symbols

    config = yaml.safe_load((made / "csp" / "csp" / "config.yaml").read_text())
    return [chemical_symbols[z] for z in config["data"]["seen"]["elements"]]


def test_a_formula_becomes_ranked_files(made, data, call, tmp_path):
    a, b = an_element(made)[:2]
    job = [
        f"checkpoint={made}/csp", f"formula={a}{b}", "z=1-2", "samples=3", "trajectory=2",
        f"reference={data}", f"output={tmp_path}/out",
    ]  # fmt: skip
    code, out, err = call("generate", *job)
    assert code == 0, err
    assert "6 crystals (0 failed)" in out and "ranked by agreement" in out
    rows = table(tmp_path / "out" / "ranked.csv")
    assert [int(r["rank"]) for r in rows] == [1, 2, 3, 4, 5, 6]
    assert {r["z"] for r in rows} == {"1", "2"} and {r["formula"] for r in rows} == {f"{a}{b}"}
    frames = read(tmp_path / "out" / "generated.extxyz", index=":")
    assert [f.info["name"] for f in frames] == [r["name"] for r in rows]
    for row, frame in zip(rows, frames, strict=True):
        assert float(row["volume_per_atom"]) == pytest.approx(
            frame.get_volume() / len(frame), rel=1e-3
        )
        cif = tmp_path / "out" / row["file"]
        raw = Structure.from_file(cif)
        assert sorted(raw.atomic_numbers) == sorted(frame.numbers)
        assert cif.with_suffix(".vasp").is_file()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["made"] == 6 and report["calls_per_sample"] == 4
    assert (tmp_path / "out" / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((tmp_path / "out" / "trajectories").iterdir())) == 6
    code, out, _ = call("generate", *job)
    assert code == 0 and "all is there already" in out
    code, _, err = call("generate", *job, "seed=1")
    assert code == 2 and "another request" in err


def test_the_model_chooses(made, call, tmp_path):
    job = [f"checkpoint={made}/ab_initio", "n=5", f"output={tmp_path}/out", "pictures=0"]
    code, _, err = call("generate", *job)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["ranked_by"] == "nobody" and report["calls_per_sample"] == 16
    assert report["made"] + report["failed"] == 5
    code, _, err = call("generate", *job[:1], "formula=NaCl", f"output={tmp_path}/no")
    assert code == 2


@pytest.mark.parametrize(
    "cell, why",
    [
        (np.diag([400.0, 0.1, 0.5]), "flat or too long"),
        (0.5 * np.eye(3), "Å³ per atom"),
        (99 * np.eye(3), "Å³ per atom"),
        (np.array([[4, 0, 0], [0, 4, 0], [900, 0, 4.0]]), "flat or too long"),
        (4 * np.eye(3), ""),
    ],
)
def test_absurd_cells_are_no_crystals(cell, why):
    found = unless_absurd(Crystal.create("a", [11], [[0, 0, 0]], cell))
    assert isinstance(found, BadCrystal) == bool(why) and (not why or why in str(found))


def test_a_table_a_data_set_and_a_judge(made, data, call, tmp_path):
    a, b = an_element(made)[:2]
    (tmp_path / "f.csv").write_text(f"formula,z\n{a},2\n{a}{b},\n")
    common = [f"checkpoint={made}/csp", "samples=2", "pictures=0"]
    code, _, err = call("generate", *common, f"input={tmp_path}/f.csv", f"output={tmp_path}/t")
    assert code == 0, err
    assert [r["formula"] for r in table(tmp_path / "t" / "ranked.csv")] == [a] * 2 + [a + b] * 2
    finetune = [
        "finetune.epochs=1", "loader.workers=0", f"init_from={made}/csp", f"data={data}",
        "target=density", f"run_dir={tmp_path}/energy",
    ]  # fmt: skip
    code, _, err = call("finetune", *finetune)
    assert code == 0, err
    targets = [f"input={data}", "count=3", f"judge={tmp_path}/energy", f"output={tmp_path}/d"]
    code, _, err = call("generate", *common, *targets)
    assert code == 0, err
    rows = table(tmp_path / "d" / "ranked.csv")
    assert len({r["target"] for r in rows}) >= 2 and len(rows) % 2 == 0
    for target in {r["target"] for r in rows}:
        scores = [float(r["score"]) for r in rows if r["target"] == target]
        assert scores == sorted(scores)
    assert all(r["scored_by"].endswith("energy") for r in rows)


def test_guidance_moves_the_property(made, data, call, tmp_path):
    """Density follows from the volume, which is easily pushed."""
    a, b = an_element(made)[:2]
    finetune = [
        "finetune.epochs=20", "loader.workers=0", f"init_from={made}/csp", f"data={data}",
        "target=density", f"run_dir={tmp_path}/density",
    ]  # fmt: skip
    code, _, err = call("finetune", *finetune)
    assert code == 0, err
    model, volumes = load(tmp_path / "density"), {}
    job = [f"checkpoint={made}/csp", f"formula={a}{b}2", "samples=8", "pictures=0"]
    guide = [f"guidance.checkpoint={tmp_path}/density", "guidance.strength=2"]
    for direction in ("up", "down"):
        out = tmp_path / direction
        code, _, err = call(
            "generate", *job, *guide, f"guidance.direction={direction}", f"output={out}"
        )
        assert code == 0, err
        frames = [Structure.from_file(p) for p in sorted(out.glob("cifs/*0?.cif"))]
        volumes[direction] = float(np.mean(model.predict(frames)))
    assert volumes["up"] > volumes["down"]
    report = json.loads((tmp_path / "up" / "report.json").read_text())
    assert report["guidance"]["strength"] == 2
    code, _, err = call("generate", *job, f"guidance.checkpoint={made}/csp", f"output={out}2")
    assert code == 2 and "no finetuned cspnet" in err
    code, _, err = call("generate", *job, *guide, "guidance.direction=toward", f"output={out}3")
    assert code == 2 and "guidance.value goes with" in err


@pytest.fixture
def generation(made, tmp_path):
    """The same work in any folder: several chunks."""
    a, b = an_element(made)[:2]
    model = load(made / "csp")

    def of(name):
        config = GenerateConfig(
            checkpoint=str(made / "csp"), formula=f"{a}{b}", z="1-3", samples=4, max_atoms=12,
            pictures=0, force=True, output=str(tmp_path / name),
        )  # fmt: skip
        job = Generation.of(config, model)
        job.begin()
        job.work.folder.mkdir(exist_ok=True)
        return job

    return of


def test_killed_anywhere_or_shared_by_ranks_the_files_are_the_same(generation, monkeypatch):
    whole = generation("whole")
    assert len(whole.work.chunks) > 3
    whole.work.make(whole.model.maker)
    whole.finish()
    expected = content(whole.output)
    shared = generation("shared")
    for rank in (1, 0):
        shared.work.make(shared.model.maker, rank, 2)
    shared.finish()
    assert content(shared.output) == expected

    class Killed(BaseException):
        pass

    dice, draw = random.Random(0), type(whole.model.maker).draw

    def dies(self, *args):
        if dice.random() < 0.5:
            raise Killed
        found = draw(self, *args)
        if dice.random() < 0.3:
            raise Killed
        return found

    monkeypatch.setattr(type(whole.model.maker), "draw", dies)
    job, deaths = generation("killed"), 0
    for _ in range(100):
        try:
            job.work.make(job.model.maker)
            break
        except Killed:
            deaths += 1
            job = generation("killed")
    assert deaths > 2
    job.finish()
    assert content(job.output) == expected


def test_other_chunks_give_the_same_draws(generation):
    job = generation("a")
    one = Chunks([job.asked], job.work.folder, job.work.sampling)
    one.make(job.model.maker)
    together, _ = one.read()
    apart = generation("b")
    apart.work.make(apart.model.maker)
    found, _ = apart.work.read()
    assert found.keys() == together.keys()
    for name, crystal in found.items():
        away = crystal.frac_coords - together[name].frac_coords
        assert np.abs(away - np.rint(away)).max() < 1e-3


def test_from_python(made):
    model = load(made / "csp")
    a, b = an_element(made)[:2]
    found = model.generate(f"{a}{b}2", samples=3, sampling={"steps": 2})
    assert [s.composition.reduced_formula for s in found] == [
        found[0].composition.reduced_formula
    ] * 3
    assert model.embed(found[0]).shape == (16,)
    again = model.generate(f"{a}{b}2", samples=3, sampling={"steps": 2}, rank=False)
    assert len(again) == 3
    chooses = load(made / "ab_initio").generate(n=2, atoms=3, elements=[a])
    assert all(set(s.symbol_set) == {a} and len(s) == 3 for s in chooses)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["formula=Na1-x"], "is no formula"),
        (["formula=Lr"], "has not learned from element Lr"),
        (["formula=NaCl", "z=0"], "no number of formula units"),
        (["formula=NaCl", "n=3"], "give one of formula, input and n"),
        (["n=3"], "needs a formula"),
        (["input=missing.csv"], "missing.csv"),
        ([], "say what to make"),
        (["formula=NaCl", "sampling.step=3"], "did you mean 'steps'"),
        (["formula=NaCl", "sampling.steps=0"], "steps must be at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(made, call, tmp_path, arguments, message):
    code, _, err = call("generate", f"checkpoint={made}/csp", f"output={tmp_path}/o", *arguments)
    assert code == 2, err
    assert message in err


def test_a_run_that_makes_nothing(runs, call, tmp_path):
    job = [f"checkpoint={runs}/fine", "formula=NaCl", f"output={tmp_path}/o"]
    code, _, err = call("generate", *job)
    assert code == 2 and "makes none" in err
    assert generate.GenerateConfig().samples == 20


def test_the_latent_flow_of_crysldnet_makes_crystals(data, call, tmp_path, runs):
    job = [
        "--config=pretrain/latent_flow", "encoder.tiny=true", "vae.max_steps=2",
        "vae.batch_size=16", "joint.max_steps=2", "joint.batch_size=16", "joint.dit.width=16",
        "joint.dit.layers=1", "joint.dit.heads=2", "loader.workers=0", "trainer.precision=fp32",
        f"data={data}", f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    code, _, err = call("pretrain", *job)
    assert code == 0, err
    made = [f"checkpoint={tmp_path}/run", "n=3", "sampling.steps=3", "pictures=0"]
    code, _, err = call("generate", *made, "atoms=4", f"output={tmp_path}/o")
    assert code == 0, err
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["stage"] == "joint" and report["made"] + report["failed"] == 3
    code, _, err = call("generate", *made, f"output={tmp_path}/p")
    assert code == 2 and "give atoms=N" in err
    plain = [f"checkpoint={runs}/pre", *made[1:], "atoms=4", f"output={tmp_path}/q"]
    code, _, err = call("generate", *plain)
    assert code == 2 and "has no heads for atoms, coords, lattice" in err
