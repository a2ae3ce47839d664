"""A training step never makes the host wait for the device outside logging steps."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from crysforge.datapipe.graphs.packing import build
from crysforge.models.denoisers.dit import DiT, DiTConfig
from crysforge.models.encoders import ENCODERS, build_encoder
from crysforge.trainer.base.distributed import World
from crysforge.trainer.engines.base import EngineConfig, set_recompute
from crysforge.trainer.engines.build import build_engine
from crysforge.trainer.loop.averages import nan_unless_finite, total_over_ranks, weighted_loss
from crysforge.trainer.loop.optim import param_groups
from crysforge.trainer.stages.base import STAGES
from crysforge.trainer.stages.finetune import HEADS, FinetuneConfig, FinetuneStage
from tests.devices import needs_gpu
from tests.models.denoisers.test_dit import inputs, pack
from tests.objectives import OBJECTIVES, collate, make

TINY = DiTConfig(width=32, layers=2, heads=4)


def setup(name, encoder, random_crystal):
    """A tiny stage and a batch for it."""
    settings = {"dit": TINY} if name == "joint" else {}
    stage = STAGES[name](
        STAGES[name].Config(**settings), build_encoder({"name": encoder, "tiny": True})
    )
    rng = np.random.default_rng(0)
    crystals = [random_crystal(rng, n, str(n)) for n in (3, 5, 2, 7)]
    return stage.train(), build(crystals, stage.encoder.graph)


@contextmanager
def no_autocast_for_meta(monkeypatch):
    """The meta device knows no autocast; nothing here depends on it."""
    with monkeypatch.context() as patch:
        real, enabled = torch.autocast, torch.is_autocast_enabled
        patch.setattr(
            torch,
            "autocast",
            lambda kind, *a, **k: nullcontext() if kind == "meta" else real(kind, *a, **k),
        )
        patch.setattr(
            torch, "is_autocast_enabled", lambda kind=None: kind != "meta" and enabled(kind)
        )
        yield


def check(stage, batch, monkeypatch):
    """Tensors of the meta device have no values: whoever reads one fails."""
    set_recompute(stage, "auto", torch.device("cuda"))
    stage, batch = stage.to("meta"), batch.to("meta")
    with no_autocast_for_meta(monkeypatch):
        terms = stage(batch)
        sums = total_over_ranks(terms, (), World())
        share, loss = weighted_loss(terms, sums, stage.weights, World())
        nan_unless_finite(share, loss).backward()
    assert all(p.grad is not None for p in stage.parameters())


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
@pytest.mark.parametrize("name", ["vae", "joint"])
def test_forward_and_backward_read_nothing_from_the_device(
    name, encoder, random_crystal, monkeypatch
):
    check(*setup(name, encoder, random_crystal), monkeypatch)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_other_objectives_read_nothing_either(objective, random_crystal, monkeypatch):
    rng = np.random.default_rng(0)
    crystals = [random_crystal(rng, n, str(n), {"space_group": 1}) for n in (3, 5, 2, 7)]
    stage = make(objective).train()
    check(stage, collate(stage, crystals), monkeypatch)


@pytest.mark.parametrize("head", HEADS)
def test_finetuning_reads_nothing_either(head, random_crystal, monkeypatch):
    rng = np.random.default_rng(0)
    crystals = [random_crystal(rng, n, str(n), {"gap": float(n)}) for n in (3, 5, 2, 7)]
    encoder = build_encoder({"name": "pddformer", "tiny": True})
    stage = FinetuneStage(FinetuneConfig(head=head), encoder, ["gap"], [1.0], [2.0]).train()
    check(stage, build(crystals, encoder.graph, targets=["gap"]), monkeypatch)


def test_what_reads_the_device_is_noticed():
    model = DiT(TINY, 6).to("meta")
    x, t, batch, ptr = (v.to("meta") for v in inputs([3, 2]))
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(x.float(), t.float(), batch, ptr)  # without sizes it must read `ptr`


def test_sizes_given_or_read_are_the_same():
    model = DiT(TINY, 6).double()
    x, t, *where = inputs([3, 1, 4])
    assert torch.equal(model(x, t, *where), model(x, t, *where, [3, 1, 4]))
    assert torch.equal(where[1], pack([3, 1, 4])[1])


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["vae", "joint"])
def test_a_step_on_a_gpu_waits_for_nothing(name, precision, random_crystal):
    stage, batch = setup(name, "pddformer", random_crystal)
    world = World(device=torch.device("cuda", 0))
    engine = build_engine(
        stage,
        param_groups(stage, 0.01),
        1.0,
        EngineConfig(engine="torch", precision=precision),
        world,
    )
    batch = batch.pin_memory()

    def step():
        terms = engine.forward(batch.to(world.device, non_blocking=True))
        sums = total_over_ranks(terms, (0.0, 1.0), world)
        share, loss = weighted_loss(terms, sums, stage.weights, world)
        engine.backward(nan_unless_finite(share, loss))
        engine.step(1e-3, 0.9)

    for _ in range(3):  # kernels are compiled and tried, the scaler is set up
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
