"""A run that is killed, stopped or moved to other ranks is the run that never was."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from crysforge.trainer.base.signals import REQUEUE
from tests.attacks import start_twice
from tests.distributed.faults import KILLED, Ended
from tests.distributed.jobs import curve
from tests.distributed.trials import ALONE, JOBS, KINDS, Blow, differences

pytestmark = pytest.mark.distributed

(ANY_MOMENT,) = [kind for kind in KINDS if kind.blows == 3]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_killed_at_any_moment(bench, job):
    """Three times in a row. Every logged loss, every exported weight and, of a finetuning, the
    weights of the best validation and the predictions made with them, bit for bit. More points
    and more faults: tests/reliability.py."""
    trial = bench.trial(ANY_MOMENT, job, seed=JOBS.index(job))
    assert trial["recovered"] and trial["exact"], trial


def vae(steps: int, *args: str):
    short = ["stages=[vae]", f"vae.max_steps={steps}", *args]
    return replace(ALONE, name="vae", args=[*ALONE.args, *short], steps=steps)


def test_a_window_of_steps_is_averaged_across_a_kill(bench, tmp_path):
    """Averages over several steps count those from before the kill, too."""
    job = vae(5, "trainer.log_every=3")
    fault = {
        "at": "crysforge.trainer.engines.torch_engine:TorchEngine.step",
        "call": 3,
        "do": "SIGTERM",
    }
    assert bench.start(job, tmp_path / "run", Blow("", {0: fault})).codes == [REQUEUE]
    assert bench.start(job, tmp_path / "run").codes == [0]
    assert not differences(tmp_path / "run", bench.whole(job))


def taken(starts: list[Ended]) -> list[tuple[int, list[str]]]:
    """(position, ids) of every step, ranks put together; what a later process took replaces what
    an earlier one did there."""
    steps: dict[int, list[str]] = {}
    for start in starts:
        own: dict[int, list[str]] = {}
        for part in start.taken:
            own.setdefault(part.position, []).extend(part.ids)
        steps |= own
    return sorted(steps.items())


def test_other_ranks_and_another_zero_stage_go_on(bench, tmp_path):
    """2 → 1 → 2 ranks, ZeRO 3 → none → 1, stopped and killed: the same curve to rounding, and in
    every epoch each crystal once."""
    job = vae(12, "trainer.validate_every=0")
    step = "crysforge.trainer.engines.{}Engine.step"
    stopped = {"at": step.format("deepspeed:DeepSpeed"), "call": 3, "do": "SIGUSR1"}
    killed = {"at": step.format("torch_engine:Torch"), "call": 4, "do": "SIGKILL"}
    plan = [
        (2, {1: stopped}, "trainer.zero_stage=3", [REQUEUE, REQUEUE]),
        (None, {0: killed}, "trainer.zero_stage=1", [KILLED]),
        (2, {}, "trainer.zero_stage=1", [0, 0]),
    ]
    starts = []
    for ranks, faults, zero, codes in plan:
        starts.append(
            bench.start(replace(job, ranks=ranks), tmp_path / "run", Blow("", faults), zero)
        )
        assert starts[-1].codes == codes, starts[-1].output[-3000:]

    one, other = curve(bench.whole(job), "vae"), curve(tmp_path / "run", "vae")
    assert [s for s, _ in one] == [s for s, _ in other]
    for (_, x), (_, y) in zip(one, other, strict=True):
        assert y == pytest.approx(x, rel=2e-4)

    steps = taken(starts)
    assert [position for position, _ in steps] == [16 * (i + 1) for i in range(12)]
    sequence = [id for _, members in steps for id in members]
    first, second = Counter(sequence[:160]), Counter(sequence[160:])
    assert len(first) == 160 and set(first.values()) == {1}
    assert len(second) == 32 and set(second) < set(first)


def test_loader_workers_go_with_a_run_that_is_killed(bench, tmp_path):
    job = vae(5, "loader.workers=2")
    fault = {
        "at": "crysforge.trainer.engines.torch_engine:TorchEngine.step",
        "call": 2,
        "do": "SIGKILL",
    }
    ended = bench.start(job, tmp_path / "run", Blow("", {0: fault}))
    assert ended.codes == [KILLED] and ended.left == []


@pytest.mark.parametrize("number", range(2), ids=["pretraining", "finetuning"])
def test_of_two_starts_at_once_the_later_has_the_run(bench, tmp_path, number):
    """Two hundred times: tests/reliability.py."""
    start_twice(number, bench, tmp_path)
