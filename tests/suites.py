"""The suites of the papers, each run to its end in small: tiny models, a hundred crystals, a few
steps, stand-in data with the published names of data sets and labels.

    python tests/suites.py OUTPUT [SUITE …]     all of them, or some; leaves runs and reports there

Every pretraining and finetuning of a suite is run, of one or two tasks and one seed, then
`evaluate`; of one pretraining `analyse`. Numbers mean nothing; that all goes through is the point.
"""

from __future__ import annotations

import importlib
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.datapipe.storage.dataset import DatasetWriter
from crysforge.launch.cluster.code import ROOT
from crysforge.launch.cluster.suite import Suite

SUITES = {
    "jarvis": ["only.task=[JARVIS MBJ gap]", "only.seed=[0]"],
    "mp": ["only.task=[MP bulk modulus]", "only.seed=[0]"],
    "ablations": ["only.task=[JARVIS SLME]", "only.seed=[0]"],
    "unified": ["only.task=[JARVIS SLME,MP shear modulus]", "only.seed=[0]"],
    "unified_own": ["only.task=[JARVIS SLME]", "only.seed=[0]"],
    "dpf": ["only.task=[JARVIS MBJ gap]", "only.seed=[0]"],
    "low_data": ["only.task=[JARVIS MBJ gap]", "only.seed=[0,1]", "only.label_fraction=[0.4,1.0]"],
    "complexity": ["only.task=[JARVIS MBJ gap]", "only.seed=[0]", "only.label_fraction=[0.4,0.8]"],
    "oqmd_exp": ["only.seed=[0]"],
    "costs": ["only.seed=[0]"],
}
"""What is run of each suite."""
SMALL = {
    "pretrain": [
        "encoder.tiny=true", "loader.workers=0", "trainer.precision=fp32", "trainer.log_every=2",
        "joint.dit={width: 32, layers: 1, heads: 2}", "crysdiff.denoiser={width: 16, layers: 1}",
        *(f"{stage}.{what}" for stage in ("vae", "joint", "dpf", "crysxpp", "crysgnn",
          "crystal_twins", "crysdiff") for what in ("max_steps=4", "batch_size=16")),
    ],
    "finetune": [
        "encoder.tiny=true", "loader.workers=0", "finetune.max_steps=6", "finetune.batch_size=16",
    ],
}  # fmt: skip
"""Settings that make the runs small, by job."""


def data_set(root: Path, labels: list[str], shares: tuple[str, ...], seed: int) -> None:
    """A stand-in data set, labelled with what follows from the structure."""
    if (root / "manifest.json").is_file():
        return
    rng = np.random.default_rng(seed)
    with DatasetWriter(root, labels) as writer:
        for i, crystal in enumerate(prototypes(size=200, seed=seed)):
            if len(crystal) <= 12 or i % 4 == 0:
                own = next(iter(crystal.targets.values()))
                values = {name: own + 0.1 * float(rng.normal()) for name in labels}
                writer.add(shares[i % len(shares)], crystal.with_targets(values))
        writer.finish({})


def make_data(folder: Path, suite: Suite) -> None:
    """The data sets that a suite's cells need, with their labels."""
    labels: dict[str, set[str]] = {}
    for cell in suite.cells:
        names = labels.setdefault(Path(cell.config["data"]).name, set())
        names |= {cell.config["target"]} if "target" in cell.config else set()
    for i, (name, targets) in enumerate(labels.items()):
        shares = ("test",) if name == "oqmd_exp" else ("train", "train", "train", "val", "test")
        data_set(folder / name, sorted(targets), shares, i)


def run(script: str, *args: str) -> None:
    """A launch script in this process."""
    sys.argv = [script, *args]
    importlib.import_module(f"crysforge.launch.{script}").main()


def settings_of(file: Path, folder: Path, name: str) -> list[str]:
    """Overrides that make a suite small."""
    chosen = [f"output={folder}/runs/{name}", f"data_dir={folder}/data", *SUITES[name]]
    text = "\n".join(p.read_text() for p in [file, *(file.parent / "parts").glob("*.yaml")])
    runs = re.findall(r"^  ([^\s:#][^:\n]*):(?=[^\n]*\bdata: |\n +(?:job|data):)", text, re.M)
    own = merged_runs(file)
    for key in dict.fromkeys(runs):
        if key in own:
            job = own[key].get("job", "pretrain")
            chosen += [f"runs.{key}.settings.{setting}" for setting in SMALL[job]]
    return [*chosen, *(f"settings.{setting}" for setting in SMALL["finetune"])]


def merged_runs(file: Path) -> dict:
    """`runs` of a suite, with those of the files that it includes."""
    from crysforge.launch.cluster.suite import _with_included
    from crysforge.trainer.base.command_line import merge_sources

    return merge_sources(_with_included(str(file))).get("runs", {})


def small_suite(name: str, folder: Path) -> Path:
    """Runs a suite in small, and evaluates it; returns its report."""
    file = ROOT / "configs" / "suites" / f"{name}.yaml"
    overrides = settings_of(file, folder, name)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for missing in merge_data(file):
        (folder / "data" / missing).mkdir(exist_ok=True)
        if not (folder / "data" / missing / "manifest.json").is_file():
            (folder / "data" / missing / "manifest.json").write_text("{}")
    suite = Suite([str(file)], overrides)
    for missing in merge_data(file):
        manifest = folder / "data" / missing / "manifest.json"
        if manifest.read_text() == "{}":
            manifest.unlink()
            manifest.parent.rmdir()
    make_data(folder / "data", suite)
    run("submit", f"suite={file}", "cluster=debug", *overrides)
    run("evaluate", f"suite={folder}/runs/{name}", "space_groups=false", "resamples=200")
    return folder / "runs" / name / "report"


def merge_data(file: Path) -> list[str]:
    """Names of a suite's data sets."""
    from crysforge.launch.cluster.suite import prepared

    return list(prepared(str(file), "data"))


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(SUITES)
    for name in names:
        began = time.monotonic()
        report = small_suite(name, folder)
        print(f"{name}: {report} after {time.monotonic() - began:.0f} s", flush=True)
    if "ablations" in names:
        run("analyse", f"checkpoint={folder}/runs/ablations/CrysLDNet",
            f"data={folder}/data/jarvis_slme", f"output={folder}/analysis", "count=30",
            "fit_count=60", "seeds=1", "max_pairs=500")  # fmt: skip


if __name__ == "__main__":
    main()
