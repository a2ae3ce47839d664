"""What may befall a run, how it goes on, and what came of it: one trial of one kind of fault.

A trial draws a job and a moment, starts the job with the fault armed, repairs what the fault broke
outside, gives the same command again until the run is whole, and compares it bit for bit with a run
that nobody disturbed. Every process is real, and so are kills, signals and process groups.
"""

from __future__ import annotations

import hashlib
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crysforge.trainer.base.signals import REQUEUE
from crysforge.trainer.loop.watchdog import Watchdog
from crysforge.trainer.runs.checkpoint import RunDirectory
from tests.distributed.faults import KILLED, REACHED, Ended, Server
from tests.distributed.jobs import curve
from tests.distributed.launched import under_launcher

SAVE_EVERY = 4
TRAINER = [
    "trainer.log_every=1", "trainer.validate_every=0.5", "trainer.deterministic=true",
    "trainer.checkpoint_minutes=0", "loader.workers=0",
]  # fmt: skip


RUNS = "crysforge.trainer.runs"


@dataclass(frozen=True)
class Job:
    """A command whose run is short and has all that long ones have."""

    name: str
    script: str
    args: list[str]
    steps: int
    ranks: int | None = None
    """None: without a launcher."""

    @property
    def size(self) -> int:
        """Processes."""
        return self.ranks or 1


def pretraining(zero: int | None) -> Job:
    """Both stages, alone (None) or on two ranks."""
    args = [
        "--config", "configs/pretrain/tiny.yaml", "vae.max_steps=12", "joint.max_steps=8",
        "vae.batch_size=16", "joint.batch_size=16", "joint.dit.width=32", "loader.shuffle=32",
        *TRAINER,
    ]  # fmt: skip
    if zero is None:
        return Job("pretraining, 1 rank", "pretrain", args, 20)
    args.append(f"trainer.zero_stage={zero}")
    return Job(f"pretraining, 2 ranks, ZeRO {zero}", "pretrain", args, 20, 2)


FINETUNING = Job(
    "finetuning",
    "finetune",
    [
        "--config", "configs/finetune/tiny.yaml", "target=density", "finetune.max_steps=16",
        "finetune.batch_size=16", "label_count=64", "loader.shuffle=32", *TRAINER,
    ],
    16,
)  # fmt: skip
ALONE, TOGETHER = pretraining(None), [pretraining(zero) for zero in range(4)]
JOBS = [ALONE, *TOGETHER, FINETUNING]


@dataclass(frozen=True)
class Moment:
    """Where a process can be hit."""

    name: str
    at: str
    calls: int
    """The latest call that is drawn."""
    within: str = ""
    main: bool = False
    """Whether only rank 0 comes there."""

    def fault(self, dice: random.Random, job: Job, do: str, least: int, share: float) -> dict:
        """One that acts then; the call is drawn from `least` to this `share` of all."""
        engine = "torch_engine:Torch" if job.ranks is None else "deepspeed:DeepSpeed"
        return {
            "at": self.at.replace("base:", engine),
            "call": dice.randint(least, max(least, int(share * self.calls))),
            "when": dice.choice(["before", "after"]),
            "within": self.within,
            "do": do,
        }


STEP = [
    Moment("forward is done", "crysforge.trainer.loop.training:total_over_ranks", 15),
    Moment("at the update", "crysforge.trainer.engines.base:Engine.step", 15),
    Moment("the step is judged", "crysforge.trainer.loop.training:StepGuard.after", 15),
    Moment("metrics are written", f"{RUNS}.logger:Logger.scalars", 15),
]
SHARDS = [Moment("a shard is opened", "crysforge.datapipe.storage.dataset:Dataset._scan", 120)]
VALIDATION = [
    Moment(
        "in validation",
        "crysforge.trainer.loop.averages:Meter.add",
        9,
        "crysforge.trainer.loop.training:evaluate",
    )
]
SAVE = [
    Moment("tensors are written", f"{RUNS}.saved:save_tensors", 8, main=True),
    Moment("JSON is written", f"{RUNS}.saved:write_json", 6, main=True),
    Moment("files are hashed", f"{RUNS}.saved:sha256", 14, main=True),
    Moment("it is in place", "crysforge.datapipe.common.files:sync_directory", 40, main=True),
    Moment("old ones are removed", f"{RUNS}.saved:remove_tree", 4, main=True),
    Moment("a file is put in place", "crysforge.datapipe.common.files:os.replace", 36, main=True),
]
BETWEEN = [
    Moment("the model is exported", f"{RUNS}.model_directory:save_tensors", 2, main=True),
    Moment("the model is described", f"{RUNS}.model_directory:write_text", 2, main=True),
    Moment(
        "the stage is finished",
        f"{RUNS}.checkpoint:RunDirectory.finish",
        2,
        main=True,
    ),
]
FORWARD = Moment(
    "forward",
    "crysforge.trainer.stages.vae:VAEStage.forward",
    12,
    "crysforge.trainer.loop.training:Training.train_step",
)
START = [Moment("the run is claimed", f"{RUNS}.checkpoint:write_text", 1, main=True)]
BEGIN = [
    Moment("the data is opened", "crysforge.datapipe.storage.dataset:Dataset.open", 1),
    Moment("the encoder is made", "crysforge.trainer.jobs.starting:starting_encoder", 1),
    Moment("the newest checkpoint is looked for", "crysforge.trainer.loop.fit:newest", 2),
    Moment("the engine is made", "crysforge.trainer.loop.fit:build_engine", 2),
]


MOMENTS = [*STEP, *SHARDS, *VALIDATION, *SAVE, *BETWEEN, FORWARD, *START, *BEGIN]


@dataclass(frozen=True)
class Blow:
    """What befalls one start of a job."""

    text: str
    faults: dict[int, dict[str, Any]] = field(default_factory=dict)
    args: list[str] = field(default_factory=list)
    own: dict[int, list[str]] = field(default_factory=dict)
    """What only one rank's command says."""
    launcher: bool = False
    """Whether the deepspeed launcher starts the ranks."""


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    name: str
    draw: Callable[[random.Random, Job, Path], Blow]
    """What to do, from dice, the job and the data."""
    codes: set[int]
    """How the ranks may end; with 0, the run goes on by itself."""
    jobs: list[Job] = field(default_factory=lambda: JOBS)
    said: tuple[str, ...] = ()
    """What the user reads."""
    after: Callable[[random.Random, Path, Path], None] = lambda dice, run, data: None
    """What happens outside before the run goes on: to the run's directory, and to the data."""
    blows: int = 1
    exact: bool = True
    """Whether the run ends as if nothing had been."""


def hit(
    moments: list[Moment], do: str, who: str = "all", least: int = 1, share: float = 1, **more: Any
) -> Callable[[random.Random, Job, Path], Blow]:
    """A fault at a moment that is drawn, on `all` ranks or on `one` that is drawn."""

    def draw(dice: random.Random, job: Job, data: Path) -> Blow:
        moment, what = dice.choice(moments), dice.choice(do.split("|"))
        one = 0 if moment.main else dice.randrange(job.size)
        ranks = list(range(job.size)) if who == "all" else [one]
        fault = {**moment.fault(dice, job, what, least, share), **more}
        text = f"{moment.name}, call {fault['call']}, {fault['when']}, rank {ranks}: {what}"
        return Blow(text, dict.fromkeys(ranks, fault))

    return draw


def with_args(draw: Callable[..., Blow], *args: str) -> Callable[[random.Random, Job, Path], Blow]:
    """The same under other settings."""

    def other(dice: random.Random, job: Job, data: Path) -> Blow:
        blow = draw(dice, job, data)
        return Blow(blow.text, blow.faults, [*blow.args, *args])

    return other


def disagree(dice: random.Random, job: Job, data: Path) -> Blow:
    """One rank's command, code or library is another."""
    rank = dice.randrange(job.size)
    if dice.random() < 0.4:
        at, answer = dice.choice(OTHERS)
        fault = {"at": f"crysforge.trainer.runs.facts:{at}", "do": f"answer {answer}"}
        return Blow(f"{at} is {answer} on rank {rank}", {rank: fault})
    setting = dice.choice(SETTINGS)
    return Blow(f"{setting} on rank {rank}", own={rank: [setting]})


SETTINGS = [
    "vae.lr=0.1", "joint.batch_size=8", "seed=1", "loader.lanes=8", "stages=[vae]",
    "trainer.accumulation=2", "trainer.precision=bf16", "encoder.width=32", "trainer.log_every=2",
]  # fmt: skip
OTHERS = [
    ("metadata.version", '"0.0"'), ("platform.python_version", '"2.7"'),
    ("code_version", '{"sources": "other"}'),
]  # fmt: skip


def gone(dice: random.Random, job: Job, data: Path) -> Blow:
    """The run's directory is deleted, or renamed, while it is going on."""
    return hit(STEP[:3], "remove RUN|delete RUN", "one", 2, 0.5)(dice, job, data)


def killed_launcher(dice: random.Random, job: Job, data: Path) -> Blow:
    """The deepspeed launcher and all that it started."""
    blow = hit([*STEP, *SHARDS, *VALIDATION, *SAVE], "group SIGKILL", "one", share=0.7)
    return replace(blow(dice, job, data), launcher=True)


def lose_shard(dice: random.Random, job: Job, data: Path) -> Blow:
    """A training shard goes away while the run reads."""
    shard = dice.choice(sorted(data.glob("train-*.tar")))
    blow = hit(STEP[:1], f"remove {shard}", "one", share=0.5)(dice, job, data)
    return Blow(blow.text.replace(str(data), "data"), blow.faults)


def restore_shard(dice: random.Random, run: Path, data: Path) -> None:
    shutil.rmtree(f"{run}.away", ignore_errors=True)
    for path in data.glob("*.away"):
        path.rename(path.with_suffix(""))


def damage(dice: random.Random, run: Path, data: Path) -> None:
    """Spoils the newest checkpoint in one of the ways that disks and people have."""
    newest = max((run / "checkpoints").glob("*/COMPLETE"), key=lambda p: p.stat().st_mtime).parent
    path = newest / dice.choice(["model.safetensors", "optimizer.safetensors", "state.json"])
    content = bytearray(path.read_bytes())
    way = dice.choice(["cut", "flip", "remove", "no marker", "empty"])
    if way == "cut":
        path.write_bytes(content[: dice.randrange(len(content))])
    elif way == "flip":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
    elif way == "empty":
        path.write_bytes(b"")
    else:
        (path if way == "remove" else newest / "COMPLETE").unlink()


MORTAL = {KILLED, 1}
SIGNAL = "SIGTERM|SIGUSR1|SIGUSR2"
KINDS = [
    Kind("SIGKILL in mid-step, all ranks", hit(STEP, "SIGKILL"), MORTAL),
    Kind(
        "SIGKILL in mid-step, one rank of two", hit(STEP, "SIGKILL", "one"), MORTAL, TOGETHER,
        said=("lost the other ranks",),
    ),
    Kind("SIGKILL while a checkpoint is written", hit(SAVE, "SIGKILL", "one"), MORTAL),
    Kind("SIGKILL between stages, or at the end", hit(BETWEEN, "SIGKILL", "one"), MORTAL),
    Kind("SIGKILL in validation", hit(VALIDATION, "SIGKILL", "one"), MORTAL),
    Kind("SIGKILL as a shard is opened", hit(SHARDS, "SIGKILL", "one"), MORTAL),
    Kind(
        "SIGKILL at any moment, three times in a row",
        hit([*START, *STEP, *SHARDS, *VALIDATION, *SAVE, *BETWEEN], "SIGKILL", "one"),
        {*MORTAL, 0}, blows=3,
    ),
    Kind(
        "SIGTERM, SIGUSR1 or SIGUSR2 to one rank",
        hit([*STEP, *VALIDATION, *SAVE], SIGNAL, "one", share=0.7), {REQUEUE},
        said=("the same command continues",),
    ),
    Kind(
        "SIGTERM, SIGUSR1 or SIGUSR2 to all ranks, twice",
        hit([*STEP, *VALIDATION], SIGNAL, share=0.6, calls=2), {REQUEUE},
        said=("the same command continues",),
    ),
    Kind(
        "the walltime ends",
        lambda dice, job, data: Blow("walltime of 0", args=["trainer.walltime_minutes=0"]),
        {REQUEUE}, said=("walltime",), blows=2,
    ),
    Kind(
        "the disk is full at a save",
        hit([Moment("a save", f"{RUNS}.checkpoint:RunDirectory.save", 4, main=True)], "disk full"),
        {0}, said=("checkpoint not written",),
    ),
    Kind(
        "the newest checkpoint is damaged",
        hit(STEP[:3], "SIGTERM", call=10), {REQUEUE},
        said=("checkpoint set aside|checkpoint not complete, removed", "continuing after step 8"),
        after=damage,
    ),
    Kind(
        "a data shard is lost, then restored", lose_shard, {1, 2}, [ALONE, *TOGETHER],
        said=("cannot open shard",), after=restore_shard,
    ),
    Kind(
        "a loader worker is killed",
        with_args(hit(STEP, "workers SIGKILL", "one", share=0.7), "loader.workers=1"), {1},
        said=("lost a loader worker",),
    ),
    Kind(
        "SIGKILL of all ranks, with loader workers",
        with_args(hit([*STEP, *VALIDATION], "SIGKILL"), "loader.workers=2"), MORTAL,
    ),
    Kind(
        "one rank hangs",
        with_args(
            hit(STEP[:3], "hang|hang with the lock", "one", 2), "trainer.step_timeout_s=5"
        ),
        {Watchdog.EXIT}, said=("no progress for 5 s|Timeout (0:00:",),
    ),
    Kind(
        "one rank of two is frozen (SIGSTOP)",
        with_args(hit(STEP[:3], "SIGSTOP", "one", 2), "trainer.step_timeout_s=5"),
        {Watchdog.EXIT, KILLED}, TOGETHER, said=("no progress for 5 s",),
    ),
    Kind(
        "one rank's command, code or library is another", disagree, {2}, TOGETHER,
        said=("the ranks of this job disagree",),
    ),
    Kind(
        "one rank of two fails as it starts", hit(BEGIN, "fail it was told to", "one"), {2},
        TOGETHER, said=("error: it was told to", ": it was told to"),
    ),
    Kind(
        "the run directory is deleted or renamed", gone, {2}, after=restore_shard,
        said=("was deleted or renamed while the run was going on",),
    ),
    Kind(
        "the deepspeed launcher is killed as a whole", killed_launcher, {KILLED}, TOGETHER,
    ),
    Kind(
        "a batch gives NaN",
        hit([FORWARD], "nan", "one"), {0},
        [ALONE, *TOGETHER], said=("update skipped",), exact=False,
    ),
]  # fmt: skip


def differences(run: Path, reference: Path) -> list[str]:
    """What of a run is not the reference's, bit for bit: logged losses and rates, exported weights,
    predictions."""
    found = []
    for stage in ("vae", "joint", "finetune"):
        for name in ("train/loss", "val/loss", "optim/lr"):
            if curve(run, stage, name) != curve(reference, stage, name):
                found.append(f"{stage} {name}")
    files = [*reference.rglob("model.safetensors"), *reference.glob("predictions_*.csv")]
    names = [f.relative_to(reference) for f in files if "checkpoints" not in f.parts]
    assert names
    for name in names:
        if (
            not (run / name).is_file()
            or (run / name).read_bytes() != (reference / name).read_bytes()
        ):
            found.append(str(name))
    return found


class Bench:
    """Tries faults.

    Args:
        server: starts the jobs.
        data: a small data set; what happens to it is undone.
        folder: where runs are; undisturbed ones that are there are taken.
    """

    def __init__(self, server: Server, data: Path, folder: Path) -> None:
        self.server, self.data, self.folder = server, data, folder

    def start(self, job: Job, run: Path, blow: Blow | None = None, *args: str) -> Ended:
        """One start of a job that saves, with or without a fault."""
        blow = blow or Blow("")
        start = under_launcher if blow.launcher else self.server.run
        faults = {r: {**f, "do": f["do"].replace("RUN", str(run))} for r, f in blow.faults.items()}
        return start(
            job.script, *job.args, f"trainer.checkpoint_every={SAVE_EVERY}", *args, *blow.args,
            f"data={self.data}", f"run_dir={run}", ranks=job.ranks, faults=faults, own=blow.own,
        )  # fmt: skip

    def whole(self, job: Job) -> Path:
        """A run that nobody disturbs and that saves nothing on the way, made once."""
        key = (job.script, *job.args, job.ranks)
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:8]
        run = self.folder / f"whole-{digest}"
        if not (run / "whole").is_file():
            shutil.rmtree(run, ignore_errors=True)
            ended = self.start(job, run, None, "trainer.checkpoint_every=0")
            assert not any(ended.codes), ended.output[-3000:]
            (run / "whole").touch()
        return run

    def trial(self, kind: Kind, job: Job, seed: int) -> dict[str, Any]:
        """Does one, and says as JSON what was done and what came of it."""
        dice, run = random.Random(seed), self.folder / f"run-{seed}"
        reference = self.whole(job)
        shutil.rmtree(run, ignore_errors=True)
        blows: list[str] = []
        starts: list[Ended] = []
        try:
            for _ in range(50):
                blow = kind.draw(dice, job, self.data)
                ended = self.start(job, run, blow)
                if REACHED in ended.output or not blow.faults:
                    blows.append(blow.text)
                elif not starts:  # the run was whole before: another one
                    assert not any(ended.codes), (ended.codes, ended.output[-2000:])
                    shutil.rmtree(run)
                    continue
                starts.append(ended)
                if len(starts) == kind.blows:
                    break
            for ended in starts:
                assert set(ended.codes) <= kind.codes, (ended.codes, ended.output[-3000:])
                assert not ended.left, ended.left
            kind.after(dice, run, self.data)
            if any(starts[-1].codes):
                starts.append(self.start(job, run))
            assert not any(starts[-1].codes), (starts[-1].codes, starts[-1].output[-3000:])
            output = "".join(ended.output for ended in starts)
            silent = [x for x in kind.said if not any(words in output for words in x.split("|"))]
            assert not silent, (silent, output[-3000:])
            assert set(RunDirectory(run).read()["finished"]) == {
                *RunDirectory(reference).read()["finished"]
            }
            problem = ""
        except AssertionError as error:
            problem = str(error)[-2000:]
        finally:
            restore_shard(dice, run, self.data)
        taken = [
            sum(t.rank == rank for ended in starts for t in ended.taken) for rank in range(job.size)
        ]
        other = [] if problem or not kind.exact else differences(run, reference)
        if not problem:
            shutil.rmtree(run)
        return {
            "fault": kind.name,
            "job": job.name,
            "seed": seed,
            "blows": blows,
            "codes": [ended.codes for ended in starts],
            "recovered": not problem,
            "lost": 0 if problem else max(taken) - job.steps + skipped(starts),
            "exact": None if problem or not kind.exact else not other,
            **({"problem": problem} if problem else {}),
            **({"other": other} if other else {}),
        }


def skipped(starts: list[Ended]) -> int:
    """Updates that were left out."""
    said = re.compile(r"step (\d+): the \w+ is non-finite, update skipped")
    return len({step for ended in starts for step in said.findall(ended.output)})
