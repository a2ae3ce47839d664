"""Engines: every ZeRO stage is the plain optimiser, and state moves between any two of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crysforge.trainer.base import distributed
from crysforge.trainer.engines import deepspeed
from crysforge.trainer.engines.base import EngineConfig
from crysforge.trainer.engines.build import build_engine
from crysforge.trainer.loop.optim import param_groups
from crysforge.trainer.stages.base import Stage, Term
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Toy(Stage):
    """Regression with parameter sizes that no number of ranks divides."""

    weights = {"mse": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, batch) -> dict[str, Term]:
        x, y = batch
        error = (self.net(x) - y) ** 2
        return {"mse": Term(error.sum(), torch.tensor(float(error.numel())))}


def steps(engine, first: int, last: int, spoilt: int = -1) -> None:
    """Trains on each rank's half of the same global batches. In step `spoilt` the gradient of the
    last rank is not finite."""
    world = engine.world
    for step in range(first, last):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, generator=g), torch.randn(8, 3, generator=g)
        part = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
        term = engine.forward((x[part], y[part]))["mse"]
        loss = term.total * world.size / 24
        if step == spoilt and world.rank == world.size - 1:
            loss = loss * torch.inf
        engine.backward(loss)
        engine.step(1e-2, 0.9)
        assert bool(engine.skipped) == (step == spoilt), (step, engine.skipped)


def job(chains: list, per: list) -> list:
    """For every chain of engines: runs so many steps on each in turn, carrying the state over;
    returns the last weights and step count."""
    world = distributed.init()
    found = []
    for engines, count in zip(chains, per, strict=True):
        weights, state = None, {}
        for i, (kind, zero) in enumerate(engines):
            stage = Toy()
            if weights is not None:
                stage.load_state_dict(weights)
            config = EngineConfig(engine=kind, zero_stage=zero)
            engine = build_engine(stage, param_groups(stage, 0.1), 1.0, config, world)
            engine.load_optimizer(state)  # before the first update it holds nothing
            steps(engine, i * count, (i + 1) * count)
            box = [engine.weights(), engine.optimizer_state()]
            if world.size > 1:
                torch.distributed.broadcast_object_list(box, 0)
            weights, state = box
        found.append(
            [*torch.cat([w.flatten() for w in weights.values()]).tolist(), float(state["step"])]
        )
    distributed.shutdown()
    return found


CHAINS = {f"zero {z}": [["deepspeed", z]] * 2 for z in range(4)} | {
    "all in turn": [["deepspeed", z] for z in (0, 3, 1, 2, 3, 0)]
}
PER = [6 // len(chain) for chain in CHAINS.values()]


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return job([[("torch", 0)] * 2], [3])[0]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request) -> dict[str, list[float]]:
    found = run_ranks(
        "tests.distributed.test_engine:job", request.param, chains=[*CHAINS.values()], per=PER
    )[0]
    return dict(zip(CHAINS, found, strict=True))


@pytest.mark.parametrize("chain", CHAINS)
def test_zero_stages_equal_plain_torch_and_continue_each_other(chain, results, plain):
    torch.testing.assert_close(
        torch.tensor(results[chain]), torch.tensor(plain), rtol=1e-5, atol=1e-6
    )


BUCKETS = [(zero, part) for zero in (1, 2, 3) for part in (0, 10**6)]
"""ZeRO stage, and how small the parts of a bucket are that are reduced together."""


def small_buckets_job() -> list:
    """Weights after training with buckets that hold a few of the parameters; one is larger."""
    world, found = distributed.init(), []
    deepspeed.BUCKET = 24
    for zero, deepspeed.SMALL_PART in BUCKETS:
        stage = Toy()
        config = EngineConfig(engine="deepspeed", zero_stage=zero)
        engine = build_engine(stage, param_groups(stage, 0.1), 1.0, config, world)
        assert engine.optimizer.reduce_bucket_size == 24
        if zero < 3:
            together = deepspeed.SMALL_PART > 0
            assert engine.optimizer.use_multi_rank_bucket_allreduce == together
        steps(engine, 0, 6)
        weights = engine.weights()
        found.append(torch.cat([w.flatten() for w in weights.values()]).tolist() if weights else [])
    distributed.shutdown()
    return found


def test_buckets_smaller_than_the_model_change_nothing(plain):
    for weights in run_ranks("tests.distributed.test_engine:small_buckets_job", 2)[0]:
        torch.testing.assert_close(
            torch.tensor(weights), torch.tensor(plain[:-1]), rtol=1e-5, atol=1e-6
        )


def state_of(engine) -> list:
    state = [engine.weights(), engine.optimizer_state()]
    return [{k: v.tolist() for k, v in tensors.items()} for tensors in state]


SPOILT = (0, 2)
ENGINES = [["deepspeed", zero, precision] for zero in range(4) for precision in ("fp32", "bf16")]


def spoilt_job(engines: list) -> list:
    """For every engine and spoilt step: the state before, right after and two steps after it."""
    world = distributed.init()
    found = []
    for kind, zero, precision in engines:
        for spoilt in SPOILT:
            stage, config = Toy(), EngineConfig(engine=kind, zero_stage=zero, precision=precision)
            engine = build_engine(stage, param_groups(stage, 0.1), 1.0, config, world)
            states = []
            for first, last in ((0, spoilt), (spoilt, spoilt + 1), (spoilt + 1, spoilt + 3)):
                steps(engine, first, last, spoilt)
                states.append(state_of(engine))
            found.append(states)
    distributed.shutdown()
    return found


def test_every_engine_leaves_out_an_update_that_is_not_finite():
    """On all ranks, without a trace in weights and moments, and then goes on as plain torch."""
    expected = spoilt_job([("torch", 0, p) for p in ("fp32", "bf16")])
    found, _ = run_ranks("tests.distributed.test_engine:spoilt_job", 2, engines=ENGINES)
    for states in expected + found:
        before, after, later = states
        assert before == after
        assert later[0] != after[0]
    for i, states in enumerate(found):
        (_, zero, precision), which = ENGINES[i // 2], i % 2
        twin = expected[which + (2 if precision == "bf16" else 0)]
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        for name, value in twin[2][0].items():
            torch.testing.assert_close(
                torch.tensor(states[2][0][name]),
                torch.tensor(value),
                rtol=tolerance,
                atol=tolerance,
                msg=f"ZeRO {zero} {precision}, {name}",
            )
