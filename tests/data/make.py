"""Makes what tests/trainer/runs/test_kept.py holds on to: a data set, a finetuned and exported
model, and a run that stopped after its first step, all as small as they get.

    python tests/data/make.py tests/data/schema-N

To be run once for a released schema, by the code that writes it; a part whose schema is that of an
earlier release need not be kept again. What is there stays. (The model of schema 1 is a run, for
there was no export.)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from crysforge import load
from crysforge.datapipe.crystals.prototypes import TARGETS, UNITS, prototypes
from crysforge.datapipe.storage.dataset import DatasetWriter
from crysforge.trainer.base.signals import REQUEUE
from tests.distributed.ranks import ROOT
from tests.trainer.runs.test_kept import ENCODER, STOPPED, crystals

FINETUNE = [
    *ENCODER, "data=set", "run_dir=tuned", "target=density", "finetune.epochs=2",
    "finetune.batch_size=8", "loader.workers=0", "trainer.deterministic=true",
]  # fmt: skip


def launch(folder: Path, script: str, *args: str) -> int:
    """Exit code of a launch script that works in `folder`."""
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *args]
    return subprocess.run(command, cwd=folder).returncode


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    with DatasetWriter(folder / "set", list(TARGETS), units=dict(UNITS)) as writer:
        small = [c for c in prototypes(size=200, seed=0) if len(c) <= 8]
        for i, crystal in enumerate(small[:24]):
            writer.add(("train", "train", "train", "train", "val", "test")[i % 6], crystal)
        writer.finish({"source": "synthetic prototypes"})
    assert launch(folder, "finetune", *FINETUNE) == 0
    assert launch(folder, "export", "checkpoint=tuned", "output=model", "license=cc0-1.0") == 0
    shutil.rmtree(folder / "tuned")
    predictions = load(folder / "model").predict(crystals(folder))
    (folder / "predictions.json").write_text(json.dumps(predictions.tolist()) + "\n")
    assert launch(folder, "pretrain", *STOPPED) == REQUEUE
    for name in ("tensorboard", "events"):
        shutil.rmtree(folder / "run" / name)
    for name in ("heartbeat.json", "metrics.jsonl"):
        (folder / "run" / name).unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
