"""Small samples of every file that is read, and how users read them: for `tests/fuzz.py`."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from crysforge import load
from crysforge.datapipe.common.files import write_json
from crysforge.datapipe.common.journal import Journal
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.preparing.duplicates.records import OUTCOME, Duplicates, Reference
from crysforge.datapipe.preparing.duplicates.search import search
from crysforge.datapipe.preparing.edit_configs import InspectConfig, VerifyConfig
from crysforge.datapipe.preparing.inspect import statistics
from crysforge.datapipe.preparing.splitting.splits import read_ids
from crysforge.datapipe.preparing.verify import verify
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.sources import read_crystals
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.remote import Access
from crysforge.launch.cluster.planning.request import Request
from crysforge.launch.cluster.planning.suite import SuitePlan
from crysforge.launch.cluster.planning.sweep import read_sweep
from crysforge.launch.cluster.status import cancel, collect, statuses, table
from crysforge.launch.evaluate import find
from crysforge.trainer.base.command_line import parse
from crysforge.trainer.jobs.schemas import FinetuneJob, pretrain_schema
from crysforge.trainer.loop.guards import dump_batch, load_batch
from crysforge.trainer.reports.report import EvaluateConfig, evaluate
from crysforge.trainer.runs.card import share
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.forms import STATE
from crysforge.trainer.runs.logger import read_metrics
from crysforge.trainer.runs.model_directory import open_checkpoint, open_model, take_encoder
from tests.evaluation_runs import arms_and_seeds
from tests.intrusions import MODEL, RUN, SET, Scene, submission


def a_set(root: Path, scene: Scene) -> None:
    shutil.copytree(SET, root)


def read_set(root: Path, scene: Scene) -> None:
    access = Access(cache_dir=str(scene.place("cache"))) if scene.dice.random() < 0.3 else Access()
    dataset = Dataset.open(root, access)
    crystals = [c for _, c in dataset.read(range(len(dataset)))]
    if scene.dice.random() < 0.3:
        list(read_crystals(str(root), workers=1))
    if scene.dice.random() < 0.2:
        list(verify(VerifyConfig(verify=str(root), workers=1, progress=False)))
        statistics(InspectConfig(inspect=str(root), workers=1, progress=False, symprec=[]))
    assert len(crystals) == len(dataset)


def a_model(root: Path, scene: Scene) -> None:
    shutil.copytree(MODEL, root)


CRYSTAL = Crystal.create("c", [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], 4 * np.eye(3))


def read_a_model(root: Path, scene: Scene) -> None:
    load(root).predict(CRYSTAL)
    with contextlib.suppress(ValueError):
        take_encoder(open_model(root), {"name": "pddformer", "width": 8})
    if scene.dice.random() < 0.3:
        share(open_model(root), scene.place("shared"))


def an_ensemble(root: Path, scene: Scene) -> None:
    for i in range(2):
        shutil.copytree(MODEL, root / str(i))
    write_json(root / "ensemble.json", {"schema": 1, "members": 2, "scale": [1.5]})


def read_an_ensemble(root: Path, scene: Scene) -> None:
    load(root).predict(CRYSTAL)


def a_run(root: Path, scene: Scene) -> None:
    shutil.copytree(RUN, root)
    beat = {"time": 1.0, "status": "running", "stage": "vae", "step": 1, "total": 4}
    write_json(root / "heartbeat.json", beat)
    lines = [{"stage": "vae", "step": i, "train/loss": 1.0 / i} for i in range(1, 5)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    event = {"time": 1.0, "event": "start", "stage": "vae", "rank": 0, "ranks": 1, "host": "a"}
    (root / "events").mkdir()
    (root / "events" / "rank-0000.jsonl").write_text(json.dumps(event | {"device": "cpu"}) + "\n")


def read_a_run(root: Path, scene: Scene) -> None:
    table(statuses(root))
    read_metrics(root, "vae")
    run = RunDirectory(root)
    with contextlib.suppress(ValueError):
        open_checkpoint(root)
    identity = json.loads((RUN / "run.json").read_text())["identity"]
    with contextlib.suppress(ValueError):
        run.start("a: 1\n", identity, scene.dice.choice(["auto", "must", "vae-00000001"]))
    newest = run.latest("vae")
    if newest is not None:
        with newest.read_state(STATE) as state:
            assert state["stream"]["position"] >= 0


def a_suite(root: Path, scene: Scene) -> None:
    arms_and_seeds(root, {"none": 0.2, "a": 0.1}, seeds=(0, 1), count=6)


def read_a_suite(root: Path, scene: Scene) -> None:
    figures = scene.dice.random() < 0.02
    settings = EvaluateConfig(suite=str(root), figures=figures, space_groups=False, resamples=5)
    evaluate(find(root), settings)


def a_submission(root: Path, scene: Scene) -> None:
    folder = submission(scene, "a", "runs/a", "1")
    folder.rename(root)
    (root / "events" / "a").mkdir(parents=True)
    event = {"event": "start", "time": 1.0, "job": "1", "attempt": 0, "node": "n", "progress": ""}
    ended = {**event, "event": "failed", "rank": 0, "code": 1}
    (root / "events" / "a.jsonl").write_text(f"{json.dumps(event)}\n{json.dumps(ended)}\n")
    (root / "events" / "a" / "rank-0000.jsonl").write_text(json.dumps(ended) + "\n")


def read_a_submission(root: Path, scene: Scene) -> None:
    table(statuses(root))
    collect(root)
    with contextlib.suppress(ValueError):
        cancel(root)


SETTINGS = {
    "data": "data/a", "run_dir": "runs/a", "target": "gap", "seed": 1, "label_fraction": 0.5,
    "encoder": {"name": "cgcnn", "width": 8}, "finetune": {"epochs": 2.0, "lr": 0.001},
    "loader": {"workers": 0, "shuffle": 8}, "trainer": {"precision": "fp32", "keep": 1},
}  # fmt: skip


def a_config(root: Path, scene: Scene) -> None:
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (root / "sweep.yaml").write_text(yaml.safe_dump({"seed": [0, 1], "target": ["a", "b"]}))
    (root / "site.yaml").write_text(yaml.safe_dump({"partition": "gpu", "time": "1:00"}))
    suite = {
        "title": "t", "output": str(root / "runs"), "baseline": "pretraining=none",
        "data": {"a": {"source": "s", "path": str(SET)}}, "config": [str(root / "config.yaml")],
        "settings": {"data": "a", "target": "density"}, "skip_missing": True,
        "factors": {"pretraining": {"none": {"init_from": "none"}}, "seed": [0, 1]},
    }  # fmt: skip
    (root / "suite.yaml").write_text(yaml.safe_dump(suite))
    write_json(root / "ids.json", {"train": ["a"], "val": [1], "test": []})


def read_a_config(root: Path, scene: Scene) -> None:
    config = f"--config={root / 'config.yaml'}"
    for read in (
        lambda: parse(FinetuneJob, None, [config]),
        lambda: parse(pretrain_schema(), None, [config, "data=s3://typed"]),
        lambda: read_ids(str(root / "ids.json")),
        lambda: read_sweep(str(root / "sweep.yaml")),
        lambda: Request.parse(["job=pretrain", f"site={root / 'site.yaml'}"], ""),
        lambda: SuitePlan([str(root / "suite.yaml")], []),
    ):
        with contextlib.suppress(ValueError):
            read()
    parse(FinetuneJob, None, [config])


CIF = (
    "data_x\n_cell_length_a 3\n_cell_length_b 3\n_cell_length_c 3\n_cell_angle_alpha 90\n"
    "_cell_angle_beta 90\n_cell_angle_gamma 90\n_symmetry_space_group_name_H-M 'P 1'\nloop_\n"
    "_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n"
    "_atom_site_fract_z\nNa Na 0 0 0\nCl Cl 0.5 0.5 0.5\n"
)
POSCAR = "NaCl\n1.0\n3 0 0\n0 3 0\n0 0 3\nNa Cl\n1 1\ndirect\n0 0 0\n0.5 0.5 0.5\n"
XYZ = (
    '2\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3 gap=1.0 pbc="T T T"\n'
    "Na 0 0 0\nCl 1.5 1.5 1.5\n"
)
JARVIS = {
    "jid": "J-1", "gap": 1.0,
    "atoms": {
        "lattice_mat": [[3, 0, 0], [0, 3, 0], [0, 0, 3]], "coords": [[0, 0, 0], [0.5, 0.5, 0.5]],
        "elements": ["Na", "Cl"], "cartesian": False,
    },
}  # fmt: skip


def a_source(root: Path, scene: Scene) -> None:
    root.mkdir()
    kind = scene.dice.choice(
        ["json", "jsonl", "csv", "cif", "vasp", "extxyz", "folder", "zip", "tar"]
    )
    if kind in ("json", "jsonl"):
        text = json.dumps([JARVIS]) if kind == "json" else json.dumps(JARVIS) + "\n"
        (root / f"crystals.{kind}").write_text(text)
    elif kind == "csv":
        quoted = CIF.replace('"', '""')
        (root / "crystals.csv").write_text(f'id,gap,cif\na,1.0,"{quoted}"\nb,,"{quoted}"\n')
    elif kind in ("cif", "vasp", "extxyz"):
        text = {"cif": CIF, "vasp": POSCAR, "extxyz": XYZ}[kind]
        (root / f"crystals.{kind}").write_text(text)
    elif kind == "folder":
        (root / "crystals").mkdir()
        (root / "crystals" / "a.cif").write_text(CIF)
        (root / "crystals" / "b.vasp").write_text(POSCAR)
        (root / "crystals" / "id_prop.csv").write_text("a.cif,1.0\nb.vasp,2.0\n")
    elif kind == "zip":
        with zipfile.ZipFile(root / "crystals.zip", "w") as archive:
            archive.writestr("a.cif", CIF)
            archive.writestr("b.vasp", POSCAR)
    else:
        with tarfile.open(root / "crystals.tar", "w") as tar:
            entry = tarfile.TarInfo("a.cif")
            entry.size = len(CIF)
            tar.addfile(entry, io.BytesIO(CIF.encode()))


def read_a_source(root: Path, scene: Scene) -> None:
    for path in root.glob("crystals*"):
        for found in read_crystals(str(path), workers=1):
            assert "\n" not in str(found) or isinstance(found, Crystal)


def a_state(root: Path, scene: Scene) -> None:
    """Smaller files that work goes on from."""
    root.mkdir()
    match = {
        "item": 0, "id": "a", "formula": "NaCl", "set": 0, "other": 0, "other_id": "b",
        "by": "structure", "rms": 0.1, "largest": 0.1,
    }  # fmt: skip
    found = {"matches": [match], "undecided": [], "pairs": {"formula": 1}}
    (root / "decided.jsonl").write_text(json.dumps(["Na1Cl1 0", found]) + "\n")
    shutil.copytree(SET, root / "set")
    dataset = Dataset.open(SET)
    crystals = [c for _, c in dataset.read(range(2)) if isinstance(c, Crystal)]
    dump_batch(root / "batch.safetensors", build(crystals, GraphSpec(neighbors=4)))


def read_a_state(root: Path, scene: Scene) -> None:
    with contextlib.suppress(ValueError):
        load_batch(root / "batch.safetensors")
    Journal(root / "decided.jsonl", OUTCOME).close()
    dataset = Dataset.open(root / "set")
    reference = Reference("r", dataset, ["train"], {})
    search(dataset, [reference], Duplicates(), root / "decided.jsonl", workers=1)


@dataclass(frozen=True)
class Reader:
    """What is read, and how."""

    name: str
    make: Callable[[Path, Scene], None] = field(compare=False)
    read: Callable[[Path, Scene], None] = field(compare=False)
    weight: int = 1
    replaced: bool = True
    """Whether files of it are replaced by links and pipes, too. What a user names himself may be
    one; links in folders of crystals are the affair of `datapipe/sources/folder.py`."""


READERS = [
    Reader("manifests and data sets", a_set, read_set, 3),
    Reader("configs, suites, sweeps, id lists", a_config, read_a_config, 3, replaced=False),
    Reader("models", a_model, read_a_model, 3),
    Reader("ensembles", an_ensemble, read_an_ensemble),
    Reader("runs and checkpoints", a_run, read_a_run, 3),
    Reader("suites of runs and their results", a_suite, read_a_suite, 2),
    Reader("submissions", a_submission, read_a_submission, 2),
    Reader("sources of crystals", a_source, read_a_source, 4, replaced=False),
    Reader("journals, kept batches", a_state, read_a_state),
]
