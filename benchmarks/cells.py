"""What the cell that crystals are described in does to errors, to single predictions and to speed.

    python benchmarks/cells.py input=elastic2015.json.gz target=K_VRH output=runs/elastic
    … n_train=800 n_val=150 n_test=231 seeds=[0,1,2] epochs=40 arms=[as_is,primitive]

Finetunes an encoder from scratch in up to four ways, see `ARMS`. Each model then meets the test
part in the cells that are given, in conventional ones, and in cells twice as long. Prints a table
of errors, one of predictions for ten cells of a material, and one of what reduction takes (CPU
time, one core). The data sets and runs stay in `output`, and a killed run goes on.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import spglib
import torch

from benchmarks.tables import markdown, show
from crysforge import load
from crysforge.datapipe.crystals.bases import standard_basis
from crysforge.datapipe.crystals.cells import Cells
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.translations import translations
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.encoders.base import ENCODERS
from crysforge.models.encoders.pddformer import PDDFormer
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run
from tests.cell_changes import cells_of

ARMS = {
    "as_is": ("as_is", []),
    "normalised": ("as_is", ["encoder.name=pddformer_normalised"]),
    "twice": ("primitive", ["encoder.own_images_once=false"]),
    "primitive": ("primitive", []),
}
"""Cell of each, and its settings. as_is: cells and graph as published; normalised: the same, with
PDDFormer's shares of the atomic number over the primitive cell; twice: primitive cells, with the
published graph, in which edges to an atom's own images count twice; primitive: the default, where
they count once."""
COPIES: dict[str, int] = {}
"""Primitive cells that the cell of each crystal holds, by id."""


@ENCODERS.register("pddformer_normalised")
class Normalised(PDDFormer):
    """PDDFormer whose column 0 of the distance rows is the share in the primitive cell."""

    def nodes(self, batch):
        copies = torch.tensor([COPIES[id] for id in batch.ids], device=batch.pdd.device)
        pdd = batch.pdd.clone()
        pdd[:, 0] *= copies[batch.node_batch]
        return super().nodes(replace(batch, pdd=pdd))


@dataclass(kw_only=True)
class CellsConfig:
    """Settings of the comparison."""

    input: str = ""
    """Anything that `prepare` reads."""
    target: str = ""
    """Label to learn."""
    n_train: int = 800
    """Labelled crystals to train on."""
    n_val: int = 150
    """Crystals to validate on."""
    n_test: int = 231
    """Crystals to test on."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the finetunings."""
    epochs: int = 40
    """Epochs of each."""
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    """Which of as_is, normalised, twice and primitive."""
    config: str = "configs/finetune/small.yaml"
    """Encoder and training."""
    settings: list[str] = field(default_factory=list)
    """More settings of `finetune`, `key=value`."""
    materials: list[str] = field(default_factory=lambda: ["rocksalt", "quartz"])
    """Materials whose ten cells are shown, see tests/cell_changes.py."""
    output: str = "runs/cells"
    """Directory of data sets and runs."""


def conventional(crystal: Crystal) -> Crystal:
    cell = crystal.lattice, crystal.frac_coords, crystal.numbers
    found = spglib.standardize_cell(cell, no_idealize=True, symprec=0.01)
    if found is None:
        return crystal
    return Crystal.create(crystal.id, found[2], found[1], found[0], crystal.targets)


def doubled(crystal: Crystal) -> Crystal:
    longer = crystal.to_pymatgen().make_supercell((2, 1, 1), in_place=False)
    return Crystal.from_pymatgen(longer, crystal.id, crystal.targets)


FORMS = {"given": lambda crystal: crystal, "conventional": conventional, "2×1×1": doubled}


def make_set(config: CellsConfig, cell: str) -> Dataset:
    path = Path(config.output) / "data" / cell
    if not path.is_dir():
        prepare(
            PrepareConfig(
                input=config.input, output=str(path), targets=[config.target], cell=cell,
                n_train=config.n_train, n_val=config.n_val, n_test=config.n_test,
                progress=False, workers=1, shard_size=500,
            )
        )  # fmt: skip
    return Dataset.open(path)


def train(config: CellsConfig, arm: str, seed: int) -> Path:
    """The run of an arm and a seed; made here if it is not there."""
    path = Path(config.output) / f"{arm}-{seed}"
    cell, settings = ARMS[arm]
    argv = sys.argv
    sys.argv = [
        "finetune", f"--config={config.config}", f"data={config.output}/data/{cell}",
        f"run_dir={path}", f"target={config.target}", f"seed={seed}",
        f"finetune.epochs={config.epochs}", *config.settings, *settings,
    ]  # fmt: skip
    try:
        importlib.import_module("crysforge.launch.finetune").main()
    finally:
        sys.argv = argv
    return path


def count_copies(crystals: list[Crystal], form: str) -> list[Crystal]:
    """The crystals with ids of their own, whose copies are known."""
    named = [replace(c, id=f"{form} {c.id}" if form else c.id) for c in crystals]
    COPIES.update({c.id: len(translations(c, Cells().tolerance)) for c in named})
    return named


def error(run: Path, crystals: list[Crystal], target: str) -> float:
    model = load(run)
    rows = list(model.iterate([model.trained_on.cells(c) for c in crystals]))
    return float(np.mean([abs(row[0] - c.targets[target]) for c, row in rows]))


def cost(crystals: list[Crystal]) -> list[dict]:
    """CPU time in µs a crystal of what reduces it."""

    def spglibs(crystal: Crystal) -> None:
        spglib.find_primitive((crystal.lattice, crystal.frac_coords, crystal.numbers), 0.01)

    cells = Cells()
    steps = {
        "search for translations": lambda c: translations(c, cells.tolerance),
        "choice of the basis": standard_basis,
        "primitive cell, in all": cells,
        "spglib.find_primitive": spglibs,
    }
    rows = []
    for name, step in steps.items():
        began = time.process_time()
        for crystal in crystals:
            step(crystal)
        rows.append({"step": name, "µs": 1e6 * (time.process_time() - began) / len(crystals)})
    return rows


def ten_cells(config: CellsConfig, runs: dict[str, list[Path]]) -> list[dict]:
    """What the first model of each arm says of ten cells of each material."""
    columns = {
        f"{material}, {arm}": load(runs[arm][0]).predict(list(cells_of(material).values()))
        for material in config.materials
        for arm in runs
        if arm != "normalised"
    }
    names = cells_of(config.materials[0])
    return [{"cell": n, **{k: v[i] for k, v in columns.items()}} for i, n in enumerate(names)]


def main() -> None:
    config = parse(CellsConfig, __doc__)
    required(config, "input", "target")
    warnings.simplefilter("ignore")
    given, _ = make_set(config, "as_is"), make_set(config, "primitive")
    everything = [c for _, c in given.read(range(len(given))) if isinstance(c, Crystal)]
    count_copies(everything, "")
    test = [c for _, c in given.read(given.split_items("test")) if isinstance(c, Crystal)]
    forms = {name: count_copies([f(c) for c in test], name) for name, f in FORMS.items()}
    rows, runs = [], {}
    for arm in config.arms:
        runs[arm] = [train(config, arm, seed) for seed in config.seeds]
        errors = {n: [error(r, cs, config.target) for r in runs[arm]] for n, cs in forms.items()}
        spread = {n: f"{np.mean(e):.4g} ± {np.std(e, ddof=1):.2g}" for n, e in errors.items()}
        rows.append({"cells": arm, **spread})
    print(f"\n{config.target}: test MAE ± standard deviation over seeds\n")
    reducible = sum(COPIES[c.id] > 1 for c in everything)
    about = {"target": config.target, "seeds": config.seeds, "epochs": config.epochs}
    show(rows, {**about, "crystals": len(everything), "not primitive": reducible})
    print("\npredictions for ten cells\n" + markdown(ten_cells(config, runs), 6))
    print("\nwhat reduction takes\n" + markdown(cost(everything), 3))


if __name__ == "__main__":
    run(main)
