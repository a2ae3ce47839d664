"""Half precision is for matrix products alone; fp16 scales its loss."""

import os

import numpy as np
import pytest
import torch

from crysforge.datapipe.graphs.packing import build
from crysforge.models.denoisers.dit import DiTConfig
from crysforge.models.encoders import build_encoder
from crysforge.trainer.base.distributed import World
from crysforge.trainer.engines.base import EngineConfig
from crysforge.trainer.engines.build import build_engine
from crysforge.trainer.loop.averages import total_over_ranks, weighted_loss
from crysforge.trainer.loop.config import TrainerConfig
from crysforge.trainer.loop.fit import fit
from crysforge.trainer.loop.optim import param_groups
from crysforge.trainer.loop.session import Session
from crysforge.trainer.stages.base import STAGES


def make(precision, random_crystal):
    torch.manual_seed(0)
    config = STAGES["joint"].Config(dit=DiTConfig(width=32, layers=2, heads=4))
    stage = STAGES["joint"](config, build_encoder({"name": "pddformer", "tiny": True}))
    rng = np.random.default_rng(0)
    batch = build([random_crystal(rng, n, str(n)) for n in (3, 5, 4)], stage.encoder.graph)
    settings = EngineConfig(engine="torch", precision=precision)
    engine = build_engine(stage, param_groups(stage, 0.0), 0.0, settings, World())
    engine.stage.train()
    return engine, batch


def backward(engine, batch):
    terms = engine.forward(batch)
    sums = total_over_ranks(terms, (), World())
    share, _ = weighted_loss(terms, sums, engine.stage.weights, World())
    engine.backward(share)
    return terms


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_gradients_moments_statistics_and_losses_are_fp32(precision, random_crystal):
    engine, batch = make(precision, random_crystal)
    terms = backward(engine, batch)
    assert all(t.total.dtype == torch.float32 for t in terms.values())
    assert all(p.grad.dtype == torch.float32 for p in engine.stage.parameters())
    engine.step(1e-3, 0.9)
    kept = [t for s in engine.optimizer.state.values() for t in s.values()]
    kept += [*engine.stage.parameters(), *engine.stage.buffers()]
    assert {t.dtype for t in kept if t.is_floating_point()} == {torch.float32}


def test_geometry_is_fp32_under_autocast(random_crystal):
    """Features of distances 1e-3 Å apart differ, which bf16's 8 bits cannot show."""
    encoder = build_encoder({"name": "pddformer", "tiny": True})
    rbf = encoder.embed_edge[0]
    with torch.autocast("cpu", torch.bfloat16):
        features = rbf(-0.75 / torch.tensor([3.0, 3.001]))
    assert features.dtype == torch.float32
    assert not torch.equal(features[0], features[1])


def test_fp16_scales_the_loss_and_the_gradients_come_out_the_same(random_crystal):
    norms = []
    for precision in ("fp32", "fp16"):
        engine, batch = make(precision, random_crystal)
        for _ in range(20):  # the scale starts too high and is halved until it fits
            backward(engine, batch)
            engine.step(1e-4, 0.9)
            if not bool(engine.skipped):
                break
        norms.append(float(engine.grad_norm))
    assert 1 < engine.scaler.get_scale() < 2**17
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_an_overflow_in_fp16_leaves_the_weights_and_lowers_the_scale(random_crystal):
    engine, batch = make("fp16", random_crystal)
    engine.scaler.scale(torch.ones(()))  # makes the scale
    engine.scaler.update(2.0**60)
    before = [p.clone() for p in engine.stage.parameters()]
    backward(engine, batch)
    engine.step(1e-3, 0.9)
    assert bool(engine.skipped)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.stage.parameters(), strict=True))
    assert engine.scaler.get_scale() == 2.0**59


def test_deterministic_matrix_products_have_the_workspace_that_torch_asks_for(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(
        "crysforge.trainer.loop.fit.newest", lambda *_: 1 / 0
    )  # ends it before it trains
    stage, settings = STAGES["joint"], TrainerConfig(deterministic=True)
    try:
        with pytest.raises(ZeroDivisionError):
            fit(
                Session(
                    stage=stage,
                    config=stage.Config(),
                    trainer=settings,
                    train=None,
                    validation=None,
                    run=None,
                    world=World(),
                )
            )
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(before)
