"""What the memory model says is what tensors take, and the presets fit their devices."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crysforge.datapipe.graphs.packing import build
from crysforge.models.denoisers.dit import DiTConfig
from crysforge.models.encoders import build_encoder
from crysforge.trainer.base.command_line import from_sources
from crysforge.trainer.base.distributed import World
from crysforge.trainer.engines.base import EngineConfig
from crysforge.trainer.engines.build import build_engine
from crysforge.trainer.jobs.schemas import pretrain_schema
from crysforge.trainer.loop.memory import (
    activation_bytes,
    memory_text,
    plan_memory,
    state_bytes,
)
from crysforge.trainer.loop.optim import param_groups
from crysforge.trainer.stages.base import STAGES
from tests.models.denoisers.test_dit import kept_bytes

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GIGABYTES = {"cpu": 16, "l40": 48, "a100-40": 40, "a100-80": 80, "h200": 141}
FP32 = EngineConfig(engine="torch")
CPU = torch.device("cpu")


def joint(width=64, layers=4):
    config = STAGES["joint"].Config(dit=DiTConfig(width=width, layers=layers, heads=4))
    return STAGES["joint"](config, build_encoder({"name": "pddformer", "tiny": True}))


def batch_for(stage, random_crystal, copies):
    rng = np.random.default_rng(0)
    crystals = [random_crystal(rng, n, str(n)) for n in (4, 12, 16)]
    return build(crystals * copies, stage.encoder.graph)


@pytest.fixture(scope="module")
def case(random_crystal):
    stage = joint()
    return stage, batch_for(stage, random_crystal, 2), batch_for(stage, random_crystal, 4)


def test_state_is_that_of_the_plain_engine():
    stage = joint()
    engine = build_engine(stage, param_groups(stage, 0.0), 1.0, FP32, World())
    for p in stage.parameters():
        p.grad = torch.zeros_like(p)
    engine.optimizer.step()
    tensors = [t for s in engine.optimizer.state.values() for t in s.values() if t.dim()]
    plan = state_bytes(sum(p.numel() for p in stage.parameters()), FP32, 1, deepspeed=False)
    assert plan.weights == sum(p.nbytes for p in stage.parameters()) == plan.gradients
    assert plan.optimizer == sum(t.nbytes for t in tensors)
    assert plan.buffers == 0


def test_zero_shards_more_with_every_stage():
    plans = [
        state_bytes(10**8, EngineConfig(zero_stage=z), ranks=8, deepspeed=True) for z in range(4)
    ]
    assert plans[1].optimizer == 3 * 4e8 / 8 < plans[0].optimizer
    assert plans[2].gradients == 4e8 / 8 < plans[1].gradients
    assert plans[3].weights == 4e8 / 8 < plans[2].weights
    assert plans[1].total > plans[2].total > plans[3].total
    alone = state_bytes(10**8, EngineConfig(zero_stage=3), ranks=1, deepspeed=False)
    assert alone.total == 16e8


def test_activations_are_at_least_what_backward_keeps_and_grow_with_the_batch(case):
    stage, small, large = case
    kept, _ = kept_bytes(stage, small)
    counted = activation_bytes(stage, small, FP32, CPU)
    assert kept < counted < 3 * kept
    assert activation_bytes(stage, large, FP32, CPU) == pytest.approx(2 * counted, rel=0.1)


def test_counting_leaves_the_stage_alone(case):
    stage, small, _ = case
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    plan_memory(stage, small, FP32, 1, False)
    assert all(torch.equal(v, before[k]) for k, v in stage.state_dict().items())
    assert all(p.grad is None for p in stage.parameters())


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16"}, {"recompute": "cheap"}, {"recompute": "blocks"}]
)
def test_bf16_and_recomputation_take_less(case, settings):
    stage, small, _ = case
    plain, less = (
        activation_bytes(stage, small, EngineConfig(engine="torch", **{"recompute": "none"} | more))
        for more in ({}, settings)
    )
    assert less < 0.9 * plain


def test_what_is_recomputed_follows_the_device(case):
    stage, small, _ = case
    for device, kind in ((CPU, "none"), (torch.device("cuda"), "cheap")):
        fixed = EngineConfig(engine="torch", recompute=kind)
        assert activation_bytes(stage, small, FP32, device) == activation_bytes(stage, small, fixed)
    with pytest.raises(ValueError, match="recompute must be auto, none, cheap, blocks"):
        EngineConfig(recompute="all")


def test_the_line_of_the_dry_run_names_what_does_not_fit(case, monkeypatch):
    stage, small, _ = case
    line = memory_text(stage, small, FP32, World())
    assert f"{small.num_atoms} atoms" in line and "TOO MUCH" not in line
    monkeypatch.setattr("crysforge.trainer.loop.memory.device_bytes", lambda device: 10**5)
    assert "TOO MUCH" in memory_text(stage, small, FP32, World())


@pytest.fixture(scope="module")
def needs(random_crystal):
    """For the paper's model under the GPUs' settings: bytes of a small batch, and more for each
    further atom of crystals without symmetry, which have the most edges."""
    config = preset("h200")
    stage = STAGES["joint"](config.joint, build_encoder(config.encoder))
    batches = [batch_for(stage, random_crystal, copies) for copies in (8, 24)]
    small, large = (plan_memory(stage, b, config.trainer, 8, True).total for b in batches)
    return small, (large - small) / (batches[1].num_atoms - batches[0].num_atoms)


def preset(device):
    model = "pretrain/small.yaml" if device == "cpu" else "pretrain/crysldnet.yaml"
    files = [str(CONFIGS / model), str(CONFIGS / "hardware" / f"{device}.yaml")]
    return from_sources(pretrain_schema(), files)


@pytest.mark.parametrize("device", [name for name in GIGABYTES if name != "cpu"])
def test_presets_fit_their_device(device, needs):
    config = preset(device)
    assert config.trainer.precision == "bf16" and config.encoder["name"] == "pddformer"
    fixed, per_atom = needs
    whole = GIGABYTES[device] * 1e9
    assert 0.4 * whole < fixed + per_atom * config.loader.max_atoms < 0.9 * whole
    assert config.loader.max_edges > 25 * config.loader.max_atoms  # atoms are the limit that binds


def test_the_preset_for_cpus_composes():
    assert preset("cpu").trainer.precision == "fp32"


def test_every_preset_is_tested():
    assert {p.stem for p in (CONFIGS / "hardware").glob("*.yaml")} == set(GIGABYTES)
