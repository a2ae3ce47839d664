"""Run directories: whole or absent, continued or refused, never half."""

from __future__ import annotations

import pytest
import torch

from trainer.checkpoint import Checkpoint, RunDirectory
from trainer.files import load_into, load_tensors, save_tensors


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        "vae",
        step,
        {"stream": {"position": step}},
        {"w": torch.full((2,), step)},
        {"step": torch.tensor(float(step))},
        {"w": torch.zeros(2)},
    )


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.start("a: 1\n", {"seed": 0, "vae": {"lr": 1}}, "auto")
    return run


def test_newest_complete_checkpoint_is_found_and_old_ones_go(run):
    for step in (3, 20, 100):
        run.save(checkpoint(step), keep=2)
    assert [p.name for p in run.tags("vae")] == ["vae-00000020", "vae-00000100"]
    (run.checkpoints / "vae-00000100" / "COMPLETE").unlink()
    found = run.latest("vae")
    assert found.step == 20
    assert found.model["w"].tolist() == [20, 20]
    assert found.state["stream"] == {"position": 20}
    assert run.latest("joint") is None


def test_a_save_that_fails_leaves_the_older_one(run, monkeypatch):
    run.save(checkpoint(1), keep=2)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("trainer.checkpoint.write_json", full)
    with pytest.raises(OSError, match="No space"):
        run.save(checkpoint(2), keep=2)
    assert run.latest("vae").step == 1


def test_continuing_needs_the_same_identity(run):
    run.start("a: 1\n", {"seed": 0, "vae": {"lr": 1}}, "must")
    with pytest.raises(ValueError, match="another vae: lr: 1 there, 2 here"):
        run.start("a: 1\n", {"seed": 0, "vae": {"lr": 2}}, "auto")
    with pytest.raises(ValueError, match="already holds a run"):
        run.start("a: 1\n", {"seed": 0, "vae": {"lr": 1}}, "never")


def test_other_directories_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        RunDirectory(tmp_path).start("", {}, "auto")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]
    with pytest.raises(ValueError, match="resume=must"):
        RunDirectory(tmp_path / "none").start("", {}, "must")


def test_finishing_a_stage_is_remembered(run):
    run.save(checkpoint(5), keep=2)
    run.finish("vae")
    run.finish("vae")
    assert run.read()["finished"] == ["vae"]
    assert run.tags("vae") == []


def test_loading_refuses_what_does_not_fit(tmp_path):
    net = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"here\.x.*lacks \['bias'\]"):
        load_into(net, {"weight": torch.zeros(3, 2)}, "here.x")
    with pytest.raises(ValueError, match=r"weight is \[2, 2\] there and \[3, 2\] here"):
        load_into(net, {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)}, "here.x")
    path = tmp_path / "m.safetensors"
    save_tensors(path, {"a": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"m\.safetensors is not a readable"):
        load_tensors(path)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"m\.safetensors is not a readable"):
        load_tensors(path)
