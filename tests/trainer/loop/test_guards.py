"""What watches over training: skipped updates, spikes, hangs, signals, walltime, averages."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.loading.config import LoaderConfig
from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.models.encoders import build_encoder
from crysforge.trainer.base.distributed import World
from crysforge.trainer.base.signals import REQUEUE, SIGNALS, Requeue, StopRequest
from crysforge.trainer.base.tensors import load_tensors, save_tensors
from crysforge.trainer.jobs import starting
from crysforge.trainer.loop.config import TrainerConfig
from crysforge.trainer.loop.dry_step import try_batch
from crysforge.trainer.loop.ema import WeightAverage
from crysforge.trainer.loop.fit import fit
from crysforge.trainer.loop.guards import SpikeMonitor, dump_batch, load_batch
from crysforge.trainer.loop.session import Session
from crysforge.trainer.loop.watchdog import Watchdog
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.logger import read_metrics
from crysforge.trainer.runs.saved import BackgroundWriter
from crysforge.trainer.stages.vae import VAEConfig, VAEStage

STEPS = 6


@pytest.fixture(scope="module")
def data(random_crystal, tmp_path_factory):
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data") / "set"
    with DatasetWriter(root, []) as writer:
        for i in range(24):
            crystal = random_crystal(rng, 2 + i % 4, f"c{i}")
            writer.add("val" if i % 6 == 5 else "train", crystal)
        writer.finish({})
    return Dataset.open(str(root))


class Probe(VAEStage):
    """A stage whose terms can be spoilt, and that tells the step it is asked for."""

    def __init__(self, config, encoder):
        super().__init__(config, encoder)
        self.calls = 0
        self.before = lambda call: None
        self.spoil = lambda call, terms: terms

    def forward(self, batch):
        if not self.training:
            return super().forward(batch)
        self.calls += 1
        self.before(self.calls)
        return self.spoil(self.calls, super().forward(batch))


@pytest.fixture
def train(data, tmp_path):
    """Runs a tiny VAE; `train(name, **trainer settings)` returns (run directory, fit's result)."""

    def train(name="run", before=None, spoil=None, monitor=None, stop=None, **settings):
        starting.seed_everything(0, "test")
        section = VAEConfig(max_steps=STEPS, batch_size=4, epochs=9)
        stage = Probe(section, build_encoder({"name": "pddformer", "tiny": True}))
        stage.before, stage.spoil = before or stage.before, spoil or stage.spoil
        train, val = [
            Stream(
                data, split, stage.encoder.graph, LoaderConfig(workers=0), batch_size=4,
                transform=stage.transform(), epochs=9, train=split == "train",
            )
            for split in ("train", "val")
        ]  # fmt: skip
        run = RunDirectory(tmp_path / name)
        run.start("a: 1\n", {}, "auto")
        config = TrainerConfig(engine="torch", **{"log_every": 1, "keep": 99, **settings})
        return run, fit(
            Session(
                stage=stage, config=section, trainer=config, train=train, validation=val, run=run,
                world=World(), monitor=monitor, stop=stop,
            )
        )  # fmt: skip

    return train


def events(run, kind, rank=0):
    lines = (run.path / "events" / f"rank-{rank:04d}.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if x["event"] == kind]


def nan_terms(terms):
    return {k: dataclasses.replace(t, total=t.total * torch.nan) for k, t in terms.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_changes_nothing(train, what):
    """Weights, moments and batch statistics after the step are those before it, bit for bit."""

    def spoil(call, terms):
        if call != 3:
            return terms
        if what == "loss":
            return nan_terms(terms)
        # the square root of zero: a finite loss with an infinite gradient
        zero = (terms["kl"].total * 0).sqrt()
        return {**terms, "kl": dataclasses.replace(terms["kl"], total=terms["kl"].total + zero)}

    run, (engine, _) = train(spoil=spoil, checkpoint_every=1)
    two, three, four = (run.load(run.checkpoints / f"vae-{s:08d}") for s in (2, 3, 4))
    assert_equal(two.optimizer, three.optimizer)
    for name, value in two.model.items():
        assert torch.equal(value, three.model[name]), name
    assert any(not torch.equal(v, four.model[k]) for k, v in three.model.items())
    assert all(v.isfinite().all() for v in engine.weights().values())

    (skip,) = events(run, "skip")
    assert (skip["step"], skip["cause"]) == (3, what)
    kept = load_batch(run.path / "skipped" / skip["batches"][0])
    assert kept.ids == skip["crystals"]
    losses = dict(read_metrics(run.path, "vae")["train/loss"])
    assert (3 in losses and losses[3] == 0) if what == "loss" else np.isfinite(losses[3])
    assert dict(read_metrics(run.path, "vae")["optim/skipped"])[STEPS] == 1


def test_too_many_in_a_row_stop_the_run(train):
    with pytest.raises(ValueError, match=r"2 updates in a row .* lower vae\.lr"):
        train(spoil=lambda call, terms: nan_terms(terms) if call > 2 else terms, max_skipped=2)
    run, _ = train("scattered", max_skipped=2, spoil=lambda c, t: nan_terms(t) if c % 2 else t)
    assert len(events(run, "skip")) == STEPS // 2


def test_a_dumped_batch_comes_back_whole(data, random_crystal, tmp_path):
    rng = np.random.default_rng(1)
    crystals = [random_crystal(rng, n, f"x{n}", {"e": 0.5 * n}) for n in (2, 3)]
    batch = build(crystals, build_encoder({"name": "pddformer", "tiny": True}).graph)
    dump_batch(tmp_path / "deep" / "b.safetensors", batch)
    back = load_batch(tmp_path / "deep" / "b.safetensors")
    assert back.ids == ["x2", "x3"] and back.is_dummy is False
    assert_equal(back.targets, batch.targets)
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(back, field.name)), field.name
    save_tensors(tmp_path / "other.safetensors", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"other\.safetensors holds no batch"):
        load_batch(tmp_path / "other.safetensors")


def test_the_largest_batch_leaves_no_trace(train, data):
    """Trying it changes neither state nor the run that follows."""
    _, (plain, _) = train("plain")
    run, (tried, _) = train("tried", try_largest=True)
    assert_equal(plain.weights(), tried.weights())
    assert read_metrics(run.path, "vae")["train/loss"]

    stage = VAEStage(VAEConfig(), build_encoder({"name": "pddformer", "tiny": True}))
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    stream = Stream(data, "train", stage.encoder.graph, LoaderConfig(workers=0), batch_size=4)
    generator = torch.get_rng_state()
    text = try_batch(stage, stream.largest(), TrainerConfig(), World())
    assert "4 crystals, 20 atoms" in text and "GB" in text
    assert_equal(before, stage.state_dict())
    assert all(p.grad is None for p in stage.parameters())
    assert torch.equal(generator, torch.get_rng_state())


def test_the_largest_batch_keeps_the_limits(data):
    spec = build_encoder({"name": "pddformer", "tiny": True}).graph
    config = LoaderConfig(workers=0, max_atoms=12)
    stream = Stream(data, "train", spec, config, batch_size=8)
    assert stream.largest().num_atoms == 12
    assert stream.position == 0


def test_spikes_are_told_from_noise():
    monitor = SpikeMonitor(3.0)
    rng = np.random.default_rng(0)
    noise = (1 + 0.5 * rng.random(100)).tolist()
    assert monitor.check(1, noise) == []
    (sentence,) = monitor.check(101, [1.2, 9.0, float("nan"), 1.3])
    assert "step 102" in sentence
    assert SpikeMonitor(3.0).check(1, [1.0, 100.0]) == []  # two losses have no median to speak of
    assert SpikeMonitor(0.0, noise).check(1, [100.0]) == []


def test_a_spike_is_a_warning_in_the_events(train):
    def spoil(call, terms):
        times = 50.0 if call == STEPS else 1.0
        return {k: dataclasses.replace(t, total=t.total * times) for k, t in terms.items()}

    SpikeMonitor.LEAST, kept = 4, SpikeMonitor.LEAST
    try:
        run, _ = train(spoil=spoil)
    finally:
        SpikeMonitor.LEAST = kept
    (warning,) = events(run, "warning")
    assert f"at step {STEPS}" in warning["message"]


@pytest.mark.parametrize("lock", [False, True], ids=["waiting", "holding the lock"])
def test_a_hang_ends_with_all_stacks(tmp_path, lock):
    """Also where the thread that hangs lets no other run."""
    hang = "ctypes.PyDLL(None).pause()" if lock else "threading.Event().wait()"
    code = (
        "import ctypes, sys, threading; from pathlib import Path\n"
        "from crysforge.trainer.loop.watchdog import Watchdog\n"
        f"Watchdog.GRACE_S = {0 if lock else 60}\n"
        f"def stuck_here(): dog = Watchdog(0.1, Path(sys.argv[1])); dog.reset(); {hang}\n"
        "stuck_here()"
    )
    path = tmp_path / "stacks" / "rank.txt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == Watchdog.EXIT
    assert "stuck_here" in (done.stderr if lock else path.read_text())
    assert lock or str(path) in done.stderr


def test_a_fed_or_absent_watchdog_stays_quiet(train):
    run, _ = train(step_timeout_s=100)
    assert not (run.path / "stacks").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_not_worth_a_run(train, capsys, monkeypatch):
    """For three steps no byte can be written: the run goes on as it would have, and its curves end
    where they should."""
    start = BackgroundWriter.start

    def at_once(self, job):
        start(self, job)
        self._thread.join()

    monkeypatch.setattr(BackgroundWriter, "start", at_once)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def before(call):
        if call in (2, 5):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0 if call == 2 else soft, hard))

    plain, (expected, _) = train("plain")
    try:
        run, (engine, _) = train("full", before=before, checkpoint_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_equal(engine.weights(), expected.weights())
    said = capsys.readouterr().out
    assert "warning: logs are not complete" in said
    assert "checkpoint not written" in said and "the newest one is vae-00000001" in said
    assert [p.name[-1] for p in run.tags("vae")] == ["1", "5", "6"]
    ours, theirs = (dict(read_metrics(r.path, "vae")["train/loss"]) for r in (run, plain))
    assert {1, 5, 6} <= ours.keys() and ours.items() <= theirs.items()
    board = EventAccumulator(str(run.path / "tensorboard" / "vae")).Reload()
    assert {1, 5, 6} <= {point.step for point in board.Scalars("train/loss")}


def test_lines_cut_off_by_a_kill_are_passed_over(train):
    run, _ = train()
    whole = read_metrics(run.path, "vae")
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "va')
    assert read_metrics(run.path, "vae") == whole


@pytest.fixture
def handlers():
    """Puts back the signal handlers of the test process."""
    old = {s: signal.getsignal(s) for s in SIGNALS}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_saves_and_asks_to_be_requeued(train, handlers, name):
    def interrupt(call):
        if call == 3:
            os.kill(os.getpid(), getattr(signal, name))

    reference, (engine, _) = train("whole")
    with pytest.raises(Requeue) as stopped:
        train("cut", before=interrupt, stop=StopRequest(environ={}))
    assert stopped.value.code == REQUEUE == 75
    run = RunDirectory(reference.path.parent / "cut")
    assert [p.name for p in run.tags("vae")] == ["vae-00000004"]  # asked before step 4's reduction
    assert events(run, "stop")[0]["reason"] == name
    _, (resumed, _) = train("cut")
    assert_equal(engine.weights(), resumed.weights())
    for name in ("train/loss", "val/loss"):
        assert read_metrics(run.path, "vae")[name] == read_metrics(reference.path, "vae")[name]


def test_a_request_before_the_first_step_ends_at_once(train, handlers):
    stop = StopRequest(environ={})
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(Requeue):
        train(before=lambda call: pytest.fail("no step is taken"), stop=stop)


def test_a_run_that_is_started_again_elsewhere_ends_here(train):
    """Two processes would mix what they write; the later one has the run, and goes on with it."""
    whole, (expected, _) = train("whole")
    other = RunDirectory(whole.path.with_name("run"))

    def start_again(call):
        if call == 3:
            other.start("a: 1\n", {}, "must")

    with pytest.raises(ValueError, match=r"run was started again, by process .* this one ends"):
        train(before=start_again, checkpoint_every=1)
    other.check_owner()
    assert {p.name[-1] for p in other.tags("vae")} <= {"1", "2"}
    assert [step for step, _ in read_metrics(other.path, "vae")["train/loss"]] == [1, 2]
    _, (engine, _) = train()
    assert_equal(engine.weights(), expected.weights())


def test_walltime_leaves_room_for_a_step_and_the_save(monkeypatch, handlers):
    now = [1000.0]
    monkeypatch.setattr("crysforge.trainer.base.signals.time.monotonic", lambda: now[0])
    stop = StopRequest(60, 3, environ={})

    def ask(after):
        now[0] += after
        return stop.wanted()

    assert not any(ask(after) for after in (0, 600, 60))  # one step took ten minutes
    while not ask(60):
        pass
    assert stop.reason == "walltime"
    left = 1000 + 60 * 60 - now[0]
    assert 60 * (3 + 10 - 1) < left <= 60 * (3 + 10)


def test_walltime_is_slurms_where_it_ends_earlier(monkeypatch, handlers):
    monkeypatch.setattr("crysforge.trainer.base.signals.time.time", lambda: 1000.0)
    assert not StopRequest(None, 3, environ={}).wanted()
    assert not StopRequest(10, 3, environ={"SLURM_JOB_END_TIME": "9000"}).wanted()
    assert StopRequest(10, 3, environ={"SLURM_JOB_END_TIME": "1000"}).wanted()
    stop = StopRequest(10, 3, environ={"SLURM_JOB_END_TIME": "9000"})
    monkeypatch.setattr(
        "crysforge.trainer.base.signals.time.time", lambda: 9000.0
    )  # the clock is set
    assert not stop.wanted()
    # of a job of one minute the margin takes a fifth, so that something gets done
    assert not StopRequest(1, 3, environ={}).wanted()


def test_the_average_is_the_plain_recursion():
    net = torch.nn.BatchNorm1d(3)
    average = WeightAverage(net, 0.9)
    expected = net.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            net.weight.normal_(generator=torch.Generator().manual_seed(step))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    torch.testing.assert_close(average.values["weight"], expected)
    live = net.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(net.weight.detach(), expected)
    assert torch.equal(net.weight.detach(), live)


@pytest.mark.parametrize("monitor", [None, "loss"])
def test_the_average_is_validated_handed_on_and_resumed(train, monitor):
    run, (engine, result) = train("whole", monitor=monitor, ema_decay=0.9, checkpoint_every=2)
    final = run.latest("vae")
    kept = final.best if monitor else final.average
    for name, value in kept.items():
        assert torch.equal(value, engine.weights()[name]), name
    assert any(not torch.equal(v, final.model[k]) for k, v in kept.items())

    class Crash(Exception):
        pass

    def crash(call):
        if call == 4:
            raise Crash

    with pytest.raises(Crash):
        train("cut", before=crash, monitor=monitor, ema_decay=0.9, checkpoint_every=2)
    _, (resumed, again) = train("cut", monitor=monitor, ema_decay=0.9, checkpoint_every=2)
    assert_equal(engine.weights(), resumed.weights())
    assert again == result


def test_signs_of_life_and_a_profile(train):
    run, _ = train(profile_steps=[2, 3])
    beat = json.loads((run.path / "heartbeat.json").read_text())
    assert (beat["stage"], beat["step"], beat["total"]) == ("vae", STEPS, STEPS)
    assert (beat["rank"], beat["status"], beat["pid"]) == (0, "finished", os.getpid())
    assert [len(events(run, kind)) for kind in ("start", "save", "finish", "stop")] == [1, 1, 1, 0]
    trace = run.path / "tensorboard" / "vae" / "steps-2-3.pt.trace.json"
    assert json.loads(trace.read_text())["traceEvents"]
    assert load_tensors(run.tags("vae")[0] / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0}, "keep must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"ema_decay": 0.9, "zero_stage": 3}, "zero_stage 0-2"),
        ({"profile_steps": [3, 2]}, r"\[first, last\]"),
    ],
)
def test_settings_that_cannot_work(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainerConfig(**settings)
