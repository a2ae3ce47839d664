"""The suites of the papers, each run to its end in small: tiny models, a hundred crystals, a few
steps, stand-in data with the published names of data sets and labels.

    python tests/suites.py OUTPUT [SUITE …]     all of them, or some; leaves runs and reports there

Every pretraining and finetuning of a suite is run, of one or two tasks and one seed, then
`evaluate`; of one pretraining `analyse`. Numbers mean nothing; that all goes through is the point.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from crysforge.datapipe.crystals.prototypes import prototypes
from crysforge.datapipe.storage.dataset import DatasetWriter
from crysforge.launch.cluster.code import ROOT
from crysforge.trainer.base.command_line import read_yaml

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


def merged(file: Path) -> dict[str, Any]:
    """What a suite's file says, with those that it includes."""
    own = read_yaml(file)
    out: dict[str, Any] = {}
    for part in [*(merged(file.parent / name) for name in own.get("include", [])), own]:
        for key in ("data", "runs"):
            out[key] = out.get(key, {}) | part.get(key, {})
        out["labels"] = [*out.get("labels", []), *part.get("labels", [])]
    texts = [own.get("settings", {}), *own.get("runs", {}).values()]
    texts += [v for f in own.get("factors", {}).values() if isinstance(f, dict) for v in f.values()]
    for one in texts:
        settings = {**one, **one.get("settings", {})} if isinstance(one, dict) else {}
        out["labels"] += [settings["target"]] if "target" in settings else []
    return out


def make_data(folder: Path, plan: dict[str, Any]) -> None:
    """Stand-in data sets; labels, under all names, are what follows from the structure."""
    labels = list(dict.fromkeys(plan["labels"]))
    for seed, name in enumerate(plan["data"]):
        if (folder / name / "manifest.json").is_file():
            continue
        shares = ("test",) if name == "oqmd_exp" else ("train", "train", "train", "val", "test")
        rng = np.random.default_rng(seed)
        with DatasetWriter(folder / name, labels) as writer:
            for i, crystal in enumerate(prototypes(size=200, seed=seed)):
                if len(crystal) <= 12 or i % 4 == 0:
                    own = next(iter(crystal.targets.values()))
                    values = {label: own + 0.1 * float(rng.normal()) for label in labels}
                    writer.add(shares[i % len(shares)], crystal.with_targets(values))
            writer.finish({})


def run(script: str, *args: str) -> None:
    """A launch script in this process."""
    sys.argv = [script, *args]
    importlib.import_module(f"crysforge.launch.{script}").main()


def small_suite(name: str, folder: Path) -> Path:
    """Runs a suite in small, and evaluates it; returns its report."""
    file = ROOT / "configs" / "suites" / f"{name}.yaml"
    plan, data = merged(file), folder / name / "data"
    make_data(data, plan)
    chosen = [f"output={folder}/{name}/runs", f"data_dir={data}", *SUITES[name]]
    chosen += [f"settings.{setting}" for setting in SMALL["finetune"]]
    for key, start in plan["runs"].items():
        settings = SMALL[start.get("job", "pretrain")]
        chosen += [f"runs.{key}.settings.{setting}" for setting in settings]
    run("submit", f"suite={file}", "cluster=debug", *chosen)
    run("evaluate", f"suite={folder}/{name}/runs", "space_groups=false", "resamples=200")
    return folder / name / "runs" / "report"


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(SUITES)
    for name in names:
        began = time.monotonic()
        report = small_suite(name, folder)
        print(f"{name}: {report} after {time.monotonic() - began:.0f} s", flush=True)
    if "ablations" in names:
        run("analyse", f"checkpoint={folder}/ablations/runs/CrysLDNet",
            f"data={folder}/ablations/data/jarvis_slme", f"output={folder}/analysis", "count=30",
            "fit_count=60", "seeds=1", "max_pairs=500")  # fmt: skip


if __name__ == "__main__":
    main()
