"""The main job on several ranks: the number of ranks, the ZeRO stage and the launcher change
nothing about what is learned."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crysforge.trainer.runs.model_directory import open_model
from tests.distributed.jobs import curve, launch
from tests.distributed.ranks import ROOT, free_port

pytestmark = pytest.mark.distributed

TINY = [
    "--config",
    "configs/pretrain/tiny.yaml",
    "vae.max_steps=6",
    "joint.max_steps=4",
    "vae.batch_size=16",
    "joint.batch_size=16",
    "trainer.log_every=1",
    "loader.workers=0",
]


def pretrain(data: Path, run: Path, *args: str, ranks: int | None = None) -> Path:
    launch("pretrain", *TINY, f"data={data}", f"run_dir={run}", *args, ranks=ranks)
    return run


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    return pretrain(data, tmp_path_factory.mktemp("runs") / "alone")


def assert_same_curves(a: Path, b: Path, rel: float) -> None:
    for stage in ("vae", "joint"):
        one, other = curve(a, stage), curve(b, stage)
        assert len(one) >= 4
        assert [s for s, _ in one] == [s for s, _ in other]
        for (_, x), (_, y) in zip(one, other, strict=True):
            assert y == pytest.approx(x, rel=rel)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_learn_as_one(zero, alone, data, tmp_path):
    run = pretrain(
        data, tmp_path / "run", f"trainer.zero_stage={zero}", "trainer.recompute=cheap", ranks=2
    )
    assert_same_curves(alone, run, rel=2e-4)
    assert curve(alone, "vae", "train/atoms")[-1][1] < curve(alone, "vae", "train/atoms")[0][1]


def test_stages_hand_the_encoder_on(alone, data, tmp_path):
    """A run of the second stage from the first one's export equals the run of both."""
    run = tmp_path / "joint"
    pretrain(data, run, "stages=[joint]", f"init_from={alone}", "init_stage=vae")
    assert curve(run, "joint") == curve(alone, "joint")


def test_bf16_stays_close(alone, data, tmp_path):
    run = pretrain(data, tmp_path / "run", "trainer.precision=bf16", ranks=2)
    assert_same_curves(alone, run, rel=0.05)


def test_accumulation_keeps_the_batch(data, tmp_path):
    """Two micro-batches of 8 take the crystals of one batch of 16."""
    run = pretrain(data, tmp_path / "run", "trainer.accumulation=2", "stages=[vae]", ranks=2)
    assert [s for s, _ in curve(run, "vae")] == list(range(1, 7))


def test_the_deepspeed_launcher(alone, data, tmp_path):
    deepspeed = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    assert deepspeed is not None
    run = tmp_path / "run"
    done = subprocess.run(
        [
            deepspeed,
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            "launch/pretrain.py",
            *TINY,
            f"data={data}",
            f"run_dir={run}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same_curves(alone, run, rel=2e-4)
    assert open_model(run).stage == "joint"
    assert done.stdout.count(" 2 processes); waiting: passive") == 2, done.stdout
