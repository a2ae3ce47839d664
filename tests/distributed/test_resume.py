"""A run that is killed, stopped or moved to other ranks is the run that never was."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.distributed.faults import KILLED, Server
from tests.distributed.jobs import curve
from trainer.signals import REQUEUE

pytestmark = pytest.mark.distributed

PRETRAIN = [
    "--config", "configs/pretrain/tiny.yaml", "vae.max_steps=5", "joint.max_steps=4",
    "vae.batch_size=16", "joint.batch_size=16", "joint.dit.width=32", "loader.workers=0",
    "loader.shuffle=32", "trainer.log_every=1", "trainer.validate_every=0.2",
    "trainer.deterministic=true", "trainer.checkpoint_minutes=0",
]  # fmt: skip
FINETUNE = [
    "--config", "configs/finetune/tiny.yaml", "target=density", "finetune.max_steps=8",
    "finetune.batch_size=16", "loader.workers=0", "trainer.log_every=1", "label_count=64",
    "trainer.validate_every=0.5", "trainer.deterministic=true", "trainer.checkpoint_minutes=0",
]  # fmt: skip
SAVING = ["trainer.checkpoint_every=2"]

MOMENTS = {
    # where a process can be hit → the latest call that is drawn
    "a shard is opened": ("datapipe.shards:Dataset._scan", 6),
    "forward is done": ("trainer.loop:total_over_ranks", 5),
    "before the update": ("trainer.engine:Engine.step", 5),
    "after the update": ("trainer.loop:StepGuard.after", 5),
    "in validation": ("trainer.meter:Meter.add", 8),
    "metrics are written": ("trainer.logger:Logger.scalars", 6),
    "tensors are written": ("trainer.checkpoint:save_tensors", 5),
    "the marker is written": ("trainer.checkpoint:write_json", 5),
    "the checkpoint is in place": ("trainer.checkpoint:sync_directory", 3),
    "a file is put in place": ("trainer.files:os.replace", 12),
    "old ones are removed": ("trainer.checkpoint:remove_tree", 6),
    "the model is exported": ("trainer.export:save_tensors", 1),
    "the model is described": ("trainer.export:write_text", 1),
    "the stage is finished": ("trainer.checkpoint:RunDirectory.finish", 1),
    "the run is claimed": ("trainer.checkpoint:write_text", 1),
}


def engine_of(zero: int | None) -> str:
    return "TorchEngine" if zero is None else "DeepSpeedEngine"


def draw(dice: random.Random, ranks: int, zero: int | None) -> tuple[str, dict]:
    """A moment, and the fault that kills a rank then."""
    name = dice.choice(list(MOMENTS))
    at, calls = MOMENTS[name]
    fault = {
        "at": at.replace("Engine.step", f"{engine_of(zero)}.step"),
        "call": dice.randint(1, calls),
        "when": dice.choice(["before", "after"]),
        "do": "SIGKILL",
    }
    return name, {dice.randrange(ranks): fault}


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def whole(server, data, tmp_path_factory):
    """Runs that nobody disturbs and that save nothing on the way, each made once."""
    made: dict[tuple, Path] = {}

    def get(script: str, args: list[str], ranks: int | None) -> Path:
        key = (script, *args, ranks)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            arguments = [*args, f"data={data}", f"run_dir={made[key]}"]
            codes, output = server.run(script, *arguments, ranks=ranks)
            assert not any(codes), output[-3000:]
        return made[key]

    return get


def assert_same_run(run: Path, reference: Path) -> None:
    """Every logged loss and every exported weight, bit for bit."""
    for stage in ("vae", "joint", "finetune"):
        for name in ("train/loss", "val/loss", "optim/lr"):
            assert curve(run, stage, name) == curve(reference, stage, name), (stage, name)
    exported = sorted(p.relative_to(reference) for p in reference.rglob("model.safetensors"))
    exported = [p for p in exported if p.parts[0] != "checkpoints"]
    assert exported
    for path in exported:
        assert (run / path).read_bytes() == (reference / path).read_bytes(), path
    for path in reference.glob("predictions_*.csv"):
        assert (run / path.name).read_bytes() == path.read_bytes()


def survive(server, script, args, run, ranks, zero, dice, kills) -> None:
    """Starts a run as often as it is killed, at moments that are drawn, until it is whole."""
    for _ in range(kills):
        name, faults = draw(dice, ranks or 1, zero)
        codes, output = server.run(
            script, *args, *SAVING, f"run_dir={run}", ranks=ranks, faults=faults
        )
        print(f"{name}, {faults}: {codes}")
        if KILLED not in codes:  # it did not come that far
            assert not any(codes), output[-3000:]
    codes, output = server.run(script, *args, *SAVING, f"run_dir={run}", ranks=ranks)
    assert not any(codes), output[-3000:]


@pytest.mark.parametrize("seed", range(2))
def test_killed_alone_at_any_moment(server, whole, data, tmp_path, seed):
    args = [*PRETRAIN, f"data={data}"]
    survive(server, "pretrain", args, tmp_path / "run", None, None, random.Random(seed), kills=5)
    assert_same_run(tmp_path / "run", whole("pretrain", PRETRAIN, None))


@pytest.mark.parametrize("zero", range(4))
def test_killed_with_others_at_any_moment(server, whole, data, tmp_path, zero):
    args = [*PRETRAIN, f"trainer.zero_stage={zero}"]
    dice = random.Random(zero)
    survive(server, "pretrain", [*args, f"data={data}"], tmp_path / "run", 2, zero, dice, kills=2)
    assert_same_run(tmp_path / "run", whole("pretrain", args, 2))


@pytest.mark.parametrize("seed", range(2))
def test_finetuning_killed_at_any_moment(server, whole, data, tmp_path, seed):
    """Also the weights of the best validation and the predictions made with them."""
    args = [*FINETUNE, f"data={data}"]
    survive(server, "finetune", args, tmp_path / "run", None, None, random.Random(seed), kills=3)
    assert_same_run(tmp_path / "run", whole("finetune", FINETUNE, None))


def test_a_window_of_steps_is_averaged_across_a_kill(server, whole, data, tmp_path):
    """Averages over several steps count those from before the kill, too."""
    args = [*PRETRAIN, "stages=[vae]", "trainer.log_every=3"]
    fault = {"at": "trainer.engine:TorchEngine.step", "call": 3, "do": "SIGTERM"}
    run = [*args, f"data={data}", f"run_dir={tmp_path / 'run'}"]
    assert server.run("pretrain", *run, faults={0: fault})[0] == [REQUEUE]
    assert server.run("pretrain", *run)[0] == [0]
    assert_same_run(tmp_path / "run", whole("pretrain", args, None))


def taken(folders: list[Path]) -> list[tuple[int, list[str]]]:
    """(position, ids) of every step, ranks put together; what a later process took replaces what
    an earlier one did there."""
    steps: dict[int, list[str]] = {}
    for folder in folders:
        own: dict[int, list[str]] = {}
        for path in folder.iterdir():
            entry = json.loads(path.read_text())
            own.setdefault(entry["position"], []).extend(entry["ids"])
        steps |= own
    return sorted(steps.items())


def test_other_ranks_and_another_zero_stage_go_on(server, whole, data, tmp_path):
    """2 → 1 → 2 ranks, ZeRO 3 → none → 1, stopped and killed: the same curve to rounding, and in
    every epoch each crystal once."""
    args = [*PRETRAIN, "stages=[vae]", "vae.max_steps=12", "trainer.validate_every=0"]
    folders: list[Path] = []

    def go(ranks, fault, *more):
        folders.append(tmp_path / f"ids-{len(folders)}")
        folders[-1].mkdir()
        faults = fault and {(ranks or 1) - 1: {"call": 4, **fault}}
        return server.run(
            "pretrain", *args, f"data={data}", f"run_dir={tmp_path / 'run'}",
            "trainer.checkpoint_every=3", *more, ranks=ranks, faults=faults, ids=folders[-1],
        )[0]  # fmt: skip

    step = "trainer.engine:{}Engine.step"
    stopped = {"at": step.format("DeepSpeed"), "do": "SIGUSR1"}
    killed = {"at": step.format("Torch"), "do": "SIGKILL"}
    assert go(2, stopped, "trainer.zero_stage=3") == [REQUEUE, REQUEUE]
    assert go(None, killed) == [KILLED]
    assert go(2, None, "trainer.zero_stage=1") == [0, 0]

    reference = whole("pretrain", args, None)
    one, other = curve(reference, "vae"), curve(tmp_path / "run", "vae")
    assert [s for s, _ in one] == [s for s, _ in other]
    for (_, x), (_, y) in zip(one, other, strict=True):
        assert y == pytest.approx(x, rel=2e-4)

    steps = taken(folders)
    assert [position for position, _ in steps] == [16 * (i + 1) for i in range(12)]
    sequence = [id for _, members in steps for id in members]
    first, second = Counter(sequence[:160]), Counter(sequence[160:])
    assert len(first) == 160 and set(first.values()) == {1}
    assert len(second) == 32 and set(second) < set(first)
