"""Engines: every ZeRO stage is the plain optimiser, and state moves between any two of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.distributed.ranks import run_ranks
from trainer import distributed
from trainer.engine import EngineConfig, build_engine
from trainer.optim import param_groups
from trainer.stage import Stage, Term

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


def steps(engine, first: int, last: int) -> list[float]:
    """Trains on each rank's half of the same global batches."""
    losses, world = [], engine.world
    for step in range(first, last):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, generator=g), torch.randn(8, 3, generator=g)
        part = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
        term = engine.forward((x[part], y[part]))["mse"]
        loss = term.total * world.size / 24
        engine.backward(loss)
        engine.step(1e-2, 0.9)
        losses.append(float(loss.detach()))
    return losses


def job(engines: list, per: int = 3) -> list | None:
    """Runs `per` steps on each engine in turn, carrying the state over; returns the weights."""
    world = distributed.init()
    weights = state = None
    for i, (kind, zero) in enumerate(engines):
        stage = Toy()
        if weights is not None:
            stage.load_state_dict(weights)
        config = EngineConfig(engine=kind, zero_stage=zero)
        engine = build_engine(stage, param_groups(stage, 0.1), 1.0, config, world)
        if state is not None:
            engine.load_optimizer(state)
        steps(engine, i * per, (i + 1) * per)
        box = [engine.weights(), engine.optimizer_state()]
        if world.size > 1:
            torch.distributed.broadcast_object_list(box, 0)
        weights, state = box
    distributed.shutdown()
    return [*torch.cat([w.flatten() for w in weights.values()]).tolist(), float(state["step"])]


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return torch.tensor(job([("torch", 0)] * 2))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_zero_stage_equals_plain_torch(zero, size, plain):
    result = torch.tensor(
        run_ranks("tests.distributed.test_engine:job", size, engines=[["deepspeed", zero]] * 2)[0]
    )
    torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-6)


def test_state_moves_between_all_zero_stages(plain):
    chain = [["deepspeed", z] for z in (0, 3, 1, 2, 3, 0)]
    result = torch.tensor(
        run_ranks("tests.distributed.test_engine:job", 2, engines=chain, per=1)[0]
    )
    torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-6)
