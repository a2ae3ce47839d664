"""The main job from end to end on synthetic crystals, with the same commands a user types.

    bash launch/demo.sh [DIR]
    python launch/demo.py out=runs/demo

Prepares synthetic crystals, pretrains a debug model without labels, finetunes it and an untrained
twin at two label fractions, predicts, and prints a table of test errors. What is done already is
not done again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.datapipe.common.processes import Parent
from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.trainer.base.command_line import parse
from crysforge.trainer.base.script import run
from crysforge.trainer.runs.forms import METRICS

TARGET = "ewald_energy"


@dataclass(kw_only=True)
class DemoConfig:
    """Settings of the demo."""

    out: str = "runs/demo"
    """Directory for everything it makes."""
    size: int = 2000
    """Synthetic crystals."""
    fractions: list[float] = field(default_factory=lambda: [0.1, 0.25])
    """Shares of the labels to finetune with."""


def call(script: str, *args: str) -> None:
    """Shows a command and runs it; its failure ends the demo."""
    print(f"$ python launch/{script}.py {' '.join(args)}", flush=True)
    path = Path(__file__).resolve().parent / f"{script}.py"
    bind = Parent.here().end_program_with_me
    done = subprocess.run([sys.executable, str(path), *args], check=False, preexec_fn=bind)
    if done.returncode:
        raise SystemExit(done.returncode)


def step(number: int, text: str) -> None:
    """A heading for what comes next."""
    print(f"\n== {number}. {text}", flush=True)


def main() -> None:
    config = parse(DemoConfig, __doc__)
    began = time.monotonic()
    out = Path(config.out)
    data, pre = out / "data", out / "pretrain"

    step(1, f"{config.size} synthetic crystals: prototypes with balanced ions, physical labels")
    if not (data / "manifest.json").is_file():
        call(
            "prepare", "input=prototypes", f"size={config.size}", f"output={data}",
            f"targets=[{TARGET},density,volume_per_atom]",
        )  # fmt: skip

    step(2, "pretraining without labels: a VAE stage, then joint latent flow matching")
    call(
        "pretrain", "--config", "configs/pretrain/tiny.yaml", f"data={data}",
        f"run_dir={pre}",
    )  # fmt: skip

    step(3, f"finetuning on {TARGET}, from scratch and from the pretrained encoder")
    metrics = {}
    for fraction in config.fractions:
        for start, source in (("scratch", "none"), ("pretrained", str(pre))):
            path = out / f"{start}-{fraction:g}"
            call(
                "finetune", "--config", "configs/finetune/tiny.yaml", f"data={data}",
                f"init_from={source}", f"target={TARGET}", f"label_fraction={fraction:g}",
                f"run_dir={path}",
            )  # fmt: skip
            metrics[fraction, start] = read_mapping(path / "metrics.json", METRICS)

    step(4, "predicting with the finetuned model")
    predictions = out / "predictions.csv"
    best = out / f"pretrained-{config.fractions[-1]:g}"
    call(
        "predict", f"checkpoint={best}", f"input={data}", f"output={predictions}",
        "overwrite=true",
    )  # fmt: skip

    unit = next(iter(metrics.values()))["units"][TARGET]
    print(f"\nTest MAE of {TARGET} ({unit}) on synthetic crystals")
    print(f"{'labels':>8} {'mean':>10} {'ridge':>10} {'scratch':>10} {'pretrained':>11}")
    for fraction in config.fractions:
        one, two = metrics[fraction, "scratch"], metrics[fraction, "pretrained"]
        simple = one["baselines"][TARGET]
        print(
            f"{one['labels']:>8} {simple['mean']:>10.3f} {simple['ridge']:>10.3f} "
            f"{one['test']['mae']:>10.3f} {two['test']['mae']:>11.3f}"
        )
    print("mean: predicts the average; ridge: composition only")
    print(f"\nrun          {pre}\ntensorboard  {pre / 'tensorboard'}\npredictions  {predictions}")
    print(f"done in {time.monotonic() - began:.0f} s; tensorboard --logdir {out} shows the curves")


if __name__ == "__main__":
    run(main)
