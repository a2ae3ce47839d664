"""A model or a run from a stranger runs no code, reads nothing outside its directory, takes no more
memory than its files, and is refused with one line that says why."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from crysforge import load
from crysforge.datapipe.common.files import sha256
from crysforge.trainer.loop.guards import load_batch
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.model_directory import open_model
from crysforge.trainer.runs.saved import Checkpoint
from tests.exploits import PICKLES, as_torch

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "tests" / "data" / "schema-2" / "model"
RUN = ROOT / "tests" / "data" / "schema-1" / "run"
CODE = [p for d in ("datapipe", "models", "trainer", "launch") for p in (ROOT / d).rglob("*.py")]


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def refused(words: str, call, *args) -> None:
    with pytest.raises(ValueError, match=words) as error:
        call(*args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dump", PICKLES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "scaler.json"])
def test_pickles_in_place_of_a_models_files(name, dump, exploit, model):
    dump(exploit, model / name)
    refused(re.escape(name), load, model)
    refused(re.escape(name), lambda: open_model(model).build_encoder())


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.pkl", "model.npz"])
def test_pickles_beside_no_weights(name, exploit, model):
    (model / "model.safetensors").unlink()
    as_torch(exploit, model / name)
    refused(f"{re.escape(name)} and no model.safetensors: pickles may run code.*ask", load, model)


def complete(saved: Path) -> None:
    """Makes a checkpoint's hashes those of its files, as who tampers with it would."""
    names = [p.name for p in saved.iterdir() if p.name != "COMPLETE"]
    (saved / "COMPLETE").write_text(json.dumps({n: sha256(saved / n) for n in names}))


@pytest.mark.parametrize("dump", PICKLES)
def test_pickles_in_a_run(dump, exploit, tmp_path):
    run = RunDirectory(shutil.copytree(RUN, tmp_path / "run"))
    (saved,) = run.checkpoints.iterdir()
    for name in ("model", "optimizer", "best", "average"):
        dump(exploit, saved / f"{name}.safetensors")
    complete(saved)
    refused("not a readable safetensors file", run.load, saved)
    dump(exploit, saved / "state.json")
    complete(saved)
    refused(r"state\.json is not ", run.load, saved)
    dump(exploit, saved / "COMPLETE")
    refused("COMPLETE is not ", run.load, saved)
    refused("every checkpoint .* is damaged", run.latest, "vae")
    dump(exploit, run.path / "run.json")
    refused(r"run\.json is not ", run.read)
    refused(r"run\.json is not ", load, run.path)


@pytest.mark.parametrize("dump", PICKLES)
def test_pickles_in_place_of_a_kept_batch(dump, exploit, tmp_path):
    dump(exploit, tmp_path / "batch.safetensors")
    refused(r"batch\.safetensors is not a readable", load_batch, tmp_path / "batch.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.mkdir ['{}']",
        "a: !!python/object/new:os.mkdir ['{}']",
        "a: !!python/name:os.mkdir",
        "a: !!python/module:os",
        "a: !custom 1",
        "!!map {{a: 1}}",
    ],
)
def test_yaml_that_makes_objects(text, exploit, model):
    (model / "config.yaml").write_text(text.format(exploit.path))
    refused(r"config\.yaml has a tag .*: it may hold plain values only", load, model)


def change(**values):
    def edit(model: Path) -> None:
        config = yaml.safe_load((model / "config.yaml").read_text())
        for key, value in values.items():
            *path, last = key.split("__")
            place = config
            for part in path:
                place = place[part]
            place[last] = value
        (model / "config.yaml").write_text(yaml.safe_dump(config))

    return edit


def text(name: str, content: str):
    return lambda model: (model / name).write_text(content)


def scaler(**values):
    def edit(model: Path) -> None:
        old = json.loads((model / "scaler.json").read_text())
        (model / "scaler.json").write_text(json.dumps({**old, **values}))

    return edit


BOMB = "a: &a [1, 1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (text("config.yaml", BOMB), r"config\.yaml has an alias"),
        (text("config.yaml", "a: " + "x" * (1 << 21)), r"config\.yaml has \d+ bytes"),
        (text("config.yaml", "a: " + "[" * 5000), "nested more than"),
        (text("config.yaml", "a: {b"), r"config\.yaml is not valid YAML"),
        (text("config.yaml", "schema: 2001-99-99"), r"has schema '2001-99-99'"),
        (text("config.yaml", f"a: {'9' * 5000}"), r"config\.yaml is not valid YAML"),
        (text("config.yaml", "[1, 2]"), "must hold a mapping"),
        (text("config.yaml", "1: 2"), "must hold a mapping"),
        (text("config.yaml", "\0"), r"config\.yaml is not valid YAML"),
        (text("config.yaml", "schema: 99"), "schema 99, this version reads 1 to 2"),
        (text("model.yaml", "schema: 2"), r"model\.yaml has schema 2"),
        (change(encoder=[1]), "encoder must be a mapping, not a list"),
        (change(stage=None), "stage must be a text, not None"),
        (change(encoder={}), "needs a name"),
        (change(encoder__name="os.system"), "unknown encoder"),
        (change(encoder__name=["pddformer"]), "unknown encoder"),
        (change(encoder__shell="rm"), "unknown config key 'encoder.shell'"),
        (change(encoder__width="${oc.env:HOME}"), "refers to values elsewhere"),
        (change(settings__head="${oc.env:HOME}"), "refers to values elsewhere"),
        (change(stage="../../x"), "stage must be the name of a stage"),
        (change(encoder__width=10**5), "describes a larger model"),
        (change(encoder__width=10**9), "describes (a larger|no) model"),
        (change(encoder__layers=900), "describes a larger model"),
        (change(encoder__layers=10**9), r"encoder\.layers' must be 0 to 1000"),
        (
            change(data__elements=[11, 999]),
            r"data\.elements\[1\] must be .* from 1 to 118, not 999",
        ),
        (change(data__elements=["Na"]), r"data\.elements\[0\] must be a whole number.* not 'Na'"),
        (change(data__elements={"Na": 1}), r"data\.elements must be a list"),
        (change(data__splits=["train"]), r"data\.splits must be a mapping, not a list"),
        (change(data__splits={"train": -1}), r"data\.splits\.train must be .*, not -1"),
        (change(data__targets={"gap": "eV"}), r"data\.targets\.gap must be a mapping, not 'eV'"),
        (change(data__labels="all"), r"data\.labels must be a whole number"),
        (change(data__provenance=3), r"data\.provenance must be a mapping, not 3"),
        (change(encoder__width=-8), "width|describes no model"),
        (change(encoder__width=10**30), "encoder.width|describes no model"),
        (change(encoder__width=16), "is from another model"),
        (change(targets=["gap"]), r"scaler\.json is of another model.*density.*gap"),
        (scaler(targets=["gap"]), r"scaler\.json is of another model"),
        (scaler(mean=[1.0]), r"scaler\.json is of another model: its mean"),
        (scaler(std=[1.0]), r"scaler\.json is of another model: its std"),
        (scaler(std=[0.0]), "standard deviation 0"),
        (
            scaler(mean=[1.0, 2.0]),
            r"scaler\.json is damaged: it must hold targets, units, mean and",
        ),
        (scaler(mean="1.0"), r"scaler\.json is damaged: mean must be a list, not '1\.0'"),
        (scaler(code="os.system"), r"scaler\.json is damaged: unknown key 'code'"),
        (text("scaler.json", "[" * 100_000), r"scaler\.json is not valid JSON"),
        (text("scaler.json", "[]"), r"scaler\.json must hold"),
        (text("scaler.json", " " * (1 << 21)), r"scaler\.json has \d+ bytes"),
        (lambda model: (model / "scaler.json").unlink(), r"has no scaler\.json"),
        (lambda model: (model / "config.yaml").unlink(), "holds no model"),
    ],
)
def test_descriptions_that_do_not_fit(edit, words, model):
    edit(model)
    refused(words, load, model)


def tensors(edit):
    def rewrite(model: Path) -> None:
        values = load_file(model / "model.safetensors")
        edit(values)
        save_file(values, model / "model.safetensors")

    return rewrite


def put(name: str, make):
    return tensors(lambda values: values.update({name: make(values.get(name))}))


def header(size: int, length: int = 0, content: bytes = b"{}"):
    def write(model: Path) -> None:
        with open(model / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", size) + content)
            if length:
                file.truncate(length)

    return write


def nan(value):
    return value.flatten().index_fill(0, torch.tensor([0]), torch.nan).reshape(value.shape)


BIAS = "readout.hidden.bias"
CLAIM = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("evil", lambda _: torch.zeros(3)), r"has \['evil'\] beyond"),
        (tensors(lambda values: values.pop(BIAS)), rf"lacks \['{BIAS}'\]"),
        (put(BIAS, lambda v: torch.cat([v, v])), rf"{BIAS} is \[16\] there and \[8\]"),
        (put(BIAS, lambda v: v.double()), rf"{BIAS} is torch.float64 there"),
        (put(BIAS, lambda v: v.to(torch.bfloat16)), rf"{BIAS} is torch.bfloat16 there"),
        (put(BIAS, nan), rf"{BIAS} has NaN"),
        (put("mean", lambda v: v / 0), "mean has NaN or infinite"),
        (header(10**9), "cut off"),
        (header(10**9, length=2 * 10**9), "claims a header of 1000000000 bytes"),
        (header(2**63), "cut off"),
        (header(len(CLAIM), content=CLAIM), "not a readable safetensors file"),
        (header(2, content=b"[]"), "not a readable safetensors file"),
        (lambda m: os.truncate(m / "model.safetensors", 9000), "not a readable safetensors file"),
        (lambda m: os.truncate(m / "model.safetensors", 5), "cut off"),
        (lambda m: os.truncate(m / "model.safetensors", 0), "cut off"),
        (lambda m: (m / "model.safetensors").unlink(), r"has no model\.safetensors"),
    ],
)
def test_weights_that_do_not_fit(edit, words, model):
    edit(model)
    refused(words, load, model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "scaler.json"])
def test_links_out_of_the_directory(name, model, tmp_path):
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    refused(rf"{re.escape(name)} is a link out of its directory.*put a copy", load, model)
    (model / name).unlink()
    (tmp_path / name).rename(model / "within")
    (model / name).symlink_to("within")
    load(model)
    (model / name).unlink()
    os.mkfifo(model / name)  # reading it would wait for ever
    refused(re.escape(name) + "|holds no model", load, model)


@pytest.mark.parametrize("finished", ["../model", "..", ".", "/model", 3, "a/../b", ["x"], "a\n"])
def test_a_runs_stages_lie_in_it(finished, model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    if isinstance(finished, str):
        finished = finished.replace("/model", str(model)) if finished[0] == "/" else finished
    (run / "run.json").write_text(json.dumps({"finished": [finished]}))
    refused(
        r"run\.json is damaged: finished\[0\] must be (a text|the name of a stage), not", load, run
    )
    (run / "vae").symlink_to(model)
    (run / "run.json").write_text(json.dumps({"finished": ["vae"]}))
    refused("vae is a link out of the run", load, run)
    refused("has no finished stage", load, run, "../model")


def test_checkpoints_that_claim_too_much(tmp_path):
    """What a run is continued from is read with the same care as a model."""
    run = RunDirectory(tmp_path / "run")
    run.start("a: 1\n", {}, "auto")
    path = run.save(Checkpoint("vae", 1, {}, {"w": torch.zeros(2)}, {"s": torch.zeros(2)}), keep=1)
    header(10**8, length=2 * 10**8)(path)
    complete(path)
    refused("claims a header", run.load, path)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    complete(path)
    refused("is a link out of its directory", run.load, path)
    (path / "state.json").write_text("[" * 100_000)
    (path / "model.safetensors").unlink()
    shutil.copy(MODEL / "model.safetensors", path)
    complete(path)
    refused("state.json is not valid JSON", run.load, path)


def names(path: Path) -> set[str]:
    """Modules a file imports, what it calls, and the keywords that it calls with."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0], *(a.name for a in node.names)}
        elif isinstance(node, ast.Call):
            found |= {dotted(node.func), *(f"{k.arg}=" for k in node.keywords)}
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` as written; other expressions begin with nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_in_the_code_unpickles_or_evaluates():
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}
    calls |= {"np.load", "numpy.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}
    calls |= {"pd.read_pickle", "pandas.read_pickle", "read_pickle", "torch.jit.load"}
    keywords = {"shell=", "allow_pickle=", "weights_only="}
    refused = modules | calls | keywords
    assert len(CODE) > 50
    found = {str(p.relative_to(ROOT)): hit for p in CODE if (hit := names(p) & refused)}
    # its unpickler looks nothing up: tests/datapipe/preparing/test_pickled.py
    assert found == {"datapipe/preparing/splitting/pickled.py": {"pickle"}}
