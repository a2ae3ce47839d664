"""Run directories: whole or absent, continued or refused, never half."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
import shutil
import threading

import pytest
import torch

from crysforge.datapipe.common.files import sha256
from crysforge.trainer.base.distributed import World
from crysforge.trainer.base.tensors import load_into, load_tensors, save_tensors
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.logger import Logger
from crysforge.trainer.runs.saved import BackgroundWriter, Checkpoint


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


def test_a_full_disk_leaves_the_older_one(run, monkeypatch):
    run.save(checkpoint(1), keep=1)
    used = shutil.disk_usage(run.path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: used._replace(free=2**20))
        with pytest.raises(OSError, match="GB free"):
            run.save(checkpoint(2), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = dataclasses.replace(checkpoint(3), optimizer={"m": torch.zeros(10_000)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # half of what is to be written
    try:
        with pytest.raises(OSError, match=r"File too large.*optimizer\.safetensors"):
            run.save(large, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in run.checkpoints.iterdir()] == ["vae-00000001"]
    assert run.latest("vae").step == 1


def test_milestones_outlive_their_stage(run):
    for step in range(1, 7):
        run.save(checkpoint(step), keep=2, milestone=step % 2 == 0)
    assert [p.name[-1] for p in run.tags("vae")] == ["2", "3", "4", "5", "6"]
    run.finish("vae")
    assert [p.name[-1] for p in run.tags("vae")] == ["2", "4", "6"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run):
    for step in (1, 2, 3):
        run.save(checkpoint(step), keep=3)
    (run.checkpoints / "vae-00000003" / "optimizer.safetensors").unlink()
    path = run.checkpoints / "vae-00000002" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run.latest("vae").step == 1
    run.save(checkpoint(3), keep=3)  # its name is free again
    assert run.latest("vae").step == 3
    for step in (1, 3):
        (run.checkpoints / f"vae-{step:08d}" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"every checkpoint .* is damaged"):
        run.latest("vae")


def test_what_a_killed_process_left_is_swept(run, caplog):
    run.save(checkpoint(1), keep=1)
    for name in (".vae-00000002.partial", "vae-00000003"):
        (run.checkpoints / name).mkdir()
        save_tensors(run.checkpoints / name / "model.safetensors", checkpoint(2).model)
    (run.checkpoints / "notes").mkdir()
    run.start("a: 1\n", {"seed": 0, "vae": {"lr": 1}}, "auto")
    assert "not complete, removed" in caplog.text and "vae-00000003" in caplog.text
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["notes", "vae-00000001"]


def test_a_run_is_its_last_starters(run):
    other = RunDirectory(run.path)
    identity = {"seed": 0, "vae": {"lr": 1}}
    for seed, resume in ((1, "auto"), (0, "vae-00000009")):
        with pytest.raises(ValueError, match=r"another seed|no checkpoint"):
            other.start("a: 1\n", {**identity, "seed": seed}, resume)
        run.check_owner()  # who is turned away takes nothing over
    other.start("a: 1\n", identity, "auto")
    other.finish("vae")
    with pytest.raises(
        ValueError, match=r"started again, by process \d+ on .*: that one continues"
    ):
        run.finish("joint")
    assert run.read()["finished"] == ["vae"]
    (run.path / "owner.json").unlink()  # as a run of an earlier version
    run.check_owner()


def test_of_two_starts_at_once_the_later_one_goes_on(tmp_path):
    """A hundred times, of a run that is new, and of one that is continued."""
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(2), fork.Queue()

    def start_all():
        for number in range(100):
            run, said = RunDirectory(tmp_path / str(number // 2)), "goes on"
            barrier.wait(60)
            try:
                run.start(f"a: {number}\n", {"seed": 0}, "auto")
                barrier.wait(60)
                run.check_owner()
            except Exception as error:
                said = str(error)
            results.put((number, said))
            barrier.wait(60)

    processes = [fork.Process(target=start_all) for _ in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in range(200))
    for process in processes:
        process.join()
    for (_, end), (_, on) in zip(found[::2], found[1::2], strict=True):
        ended, went_on = sorted((end, on), key=lambda said: said == "goes on")
        assert went_on == "goes on" and "was started again, by process" in ended
    names = {p.name for p in tmp_path.glob("*/*")}
    assert names == {"run.json", "owner.json", "config.yaml"}


def test_what_could_not_be_deleted_is_no_obstacle(run):
    (run.checkpoints / "vae-00000001").mkdir(parents=True)
    (run.checkpoints / "vae-00000001" / ".nfs01").touch()
    run.save(checkpoint(1), keep=1)
    assert run.latest("vae").step == 1


def test_a_checkpoint_that_goes_while_it_is_read_is_named(run, monkeypatch):
    def opened(file):  # by torch, after the header
        return torch.UntypedStorage.from_file(str(file), False, 1)

    for name, read, words in (
        ("runs.saved.sha256", sha256, "vae-00000001 is not complete, or being deleted"),
        ("base.tensors.load_file", opened, r"model\.safetensors was deleted while it was read"),
    ):
        path = run.save(checkpoint(1), keep=1)
        with monkeypatch.context() as patch:
            patch.setattr(
                f"crysforge.trainer.{name}", lambda file, read=read: file.unlink() or read(file)
            )
            with pytest.raises(ValueError, match=words):
                run.load(path)
        shutil.rmtree(path)


def test_a_checkpoint_says_what_made_it(run):
    run.start("a: 2\n", {"seed": 0, "vae": {"lr": 1}}, "auto")  # harmless settings may change
    assert (run.path / "config.yaml").read_text() == "a: 2\n"
    path = run.save(checkpoint(1), keep=1)
    assert (path / "config.yaml").read_text() == "a: 2\n"
    code = run.latest("vae").state["code"]
    assert code["version"] and len(code["sources"]) == 16


@pytest.mark.parametrize("marker", ["", "{}", "null", "[]", "some", "more"])
def test_a_checkpoint_without_all_hashes_is_not_taken(run, marker, caplog):
    """As one of an early version, whose marker was empty, or one that somebody tampered with."""
    run.save(checkpoint(1), keep=2)
    path = run.save(checkpoint(2), keep=2)
    hashes = json.loads((path / "COMPLETE").read_text())
    if marker == "some":
        marker = json.dumps({k: v for k, v in hashes.items() if k != "optimizer.safetensors"})
    if marker == "more":
        marker = json.dumps(hashes)
        save_tensors(path / "average.safetensors", {"w": torch.ones(2)})
    (path / "COMPLETE").write_text(marker)
    assert run.latest("vae").step == 1
    assert "COMPLETE" in caplog.text and (path.parent / "vae-00000002.damaged").is_dir()


def test_going_back_to_a_checkpoint(run):
    """Later ones are set aside, the stage is open again; the same command then goes on."""
    identity = {"seed": 0, "vae": {"lr": 1}}
    for step in (10, 20, 30):
        run.save(checkpoint(step), keep=3, milestone=True)
    run.finish("vae")
    run.save(dataclasses.replace(checkpoint(5), stage="joint"), keep=3)
    with pytest.raises(ValueError, match="no checkpoint 'vae-00000011'; it has: joint-00000005, v"):
        run.start("a: 1\n", identity, "vae-00000011")
    record = run.start("a: 1\n", identity, "vae-00000020")
    assert record["finished"] == [] and run.read()["finished"] == []
    assert run.latest("vae").step == 20
    assert run.latest("joint") is None
    assert len(list(run.checkpoints.glob("*.superseded"))) == 2
    run.save(checkpoint(40), keep=3)
    run.start("a: 1\n", identity, "vae-00000020")  # a requeued job
    assert run.latest("vae").step == 40
    run.start("a: 1\n", identity, "auto")
    run.start("a: 1\n", identity, "vae-00000020")
    assert run.latest("vae").step == 20


def test_the_writer_does_one_thing_at_a_time_and_hides_nothing():
    writer, order, gate = BackgroundWriter(), [], threading.Event()

    def job(name):
        gate.wait()
        order.append(name)

    writer.start(lambda: job(1))
    assert order == []
    threading.Timer(0.01, gate.set).start()
    writer.start(lambda: job(2))
    assert order[0] == 1
    writer.wait()
    assert order == [1, 2]

    def fail():
        raise OSError("No space left on device")

    writer.start(fail)
    with pytest.raises(OSError, match="No space"):
        writer.wait()
    writer.wait()


def test_continuing_needs_the_same_identity(run):
    run.start("a: 1\n", {"seed": 0, "vae": {"lr": 1}}, "must")
    with pytest.raises(ValueError, match="another vae: lr: 1 there, 2 here"):
        run.start("a: 1\n", {"seed": 0, "vae": {"lr": 2}}, "auto")
    with pytest.raises(ValueError, match="already holds a run"):
        run.start("a: 1\n", {"seed": 0, "vae": {"lr": 1}}, "never")


@pytest.mark.parametrize("name", ["write_json", "write_text"])
def test_a_claim_that_is_killed_can_be_repeated(tmp_path, monkeypatch, name):
    run = RunDirectory(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(f"crysforge.trainer.runs.checkpoint.{name}", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.start("a: 1\n", {}, "auto")
    for name in (".run.json.tmp", ".run.json.0123abcd.tmp", "lock"):
        (run.path / name).write_text("{")
    run.start("a: 1\n", {}, "auto")
    assert (run.path / "config.yaml").read_text() == "a: 1\n"


def test_other_directories_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        RunDirectory(tmp_path).start("", {}, "auto")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]
    for resume in ("must", "vae-00000001"):
        with pytest.raises(ValueError, match=f"resume={resume}, but .* holds no run"):
            RunDirectory(tmp_path / "none").start("", {}, resume)


def vanish(run: RunDirectory, how: str) -> None:
    if how == "deleted":
        shutil.rmtree(run.path)
    else:
        run.path.rename(run.path.with_name("other"))


@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_a_run_that_is_gone_ends_and_is_not_made_anew(run, how):
    log = Logger(run.path, "vae", 0, 9, World())
    vanish(run, how)
    log.event("warning")
    log.heartbeat(1)
    log.scalars(1, {"x": 1.0})
    with pytest.raises(FileNotFoundError):
        run.save(checkpoint(1), keep=1)
    with pytest.raises(FileNotFoundError):
        Logger(run.path, "joint", 0, 9, World())
    log.close()
    for ask in (run.check_owner, lambda: run.finish("vae")):
        with pytest.raises(
            ValueError, match=r"run was deleted or renamed while .* the same command"
        ):
            ask()
    assert not run.path.exists()


def test_what_a_process_writes_as_its_run_is_deleted_does_not_block_the_next(run, caplog):
    identity = {"seed": 0, "vae": {"lr": 1}}
    for name in ("leftover", "leftover-2"):
        log = Logger(run.path, "vae", 0, 9, World())
        run.save(checkpoint(7), keep=1)
        log.heartbeat(1, "stopped")
        log.close()
        for own in ("run.json", "config.yaml", "owner.json"):  # `rm -r` was here already
            (run.path / own).unlink()
        (run.path / ".heartbeat.json.tmp").touch()
        record = RunDirectory(run.path).start("a: 1\n", identity, "auto")
        assert record["finished"] == [] and run.latest("vae") is None
        assert f"is now in {run.path / name}" in caplog.text
        left = {p.name for p in (run.path / name).iterdir()}
        assert left == {"checkpoints", "events", "heartbeat.json", "metrics.jsonl", "tensorboard"}
    (run.path / "run.json").unlink()
    (run.path / "config.yaml").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        run.start("a: 1\n", identity, "auto")


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


def test_tensors_may_be_read_by_whoever_may_read_other_new_files(tmp_path):
    (tmp_path / "other").touch()
    save_tensors(tmp_path / "m.safetensors", {"a": torch.ones(3)})
    modes = {p.name: p.stat().st_mode for p in tmp_path.iterdir()}
    assert modes["m.safetensors"] == modes["other"]


def test_a_setting_that_is_new_since_a_run_began_has_its_default(run):
    """Another value of it is another run."""
    later = RunDirectory(run.path)
    known = {"seed": 0, "vae": {"lr": 1, "decoder": {"heads": "linear"}}}
    defaults = {"vae": {"lr": 7, "decoder": {"heads": "linear"}}}
    later.start("a: 1\n", known, "must", defaults)
    with pytest.raises(ValueError, match="another vae: decoder: "):
        later.start(
            "a: 1\n", {**known, "vae": {"lr": 1, "decoder": {"heads": "mlp"}}}, "must", defaults
        )
    with pytest.raises(ValueError, match="another vae: lr: 1 there, 7 here"):
        later.start("a: 1\n", {**known, "vae": defaults["vae"]}, "must", defaults)
