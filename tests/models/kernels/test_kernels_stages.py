"""Whole training steps on the Triton kernels are those of the definitions, as a GPU takes them."""

import numpy as np
import pytest
import torch

from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.graphs.transforms import Sample
from crysforge.models import kernels
from crysforge.models.denoisers.dit import DiTConfig
from crysforge.models.encoders import build_encoder
from crysforge.trainer.base.distributed import World
from crysforge.trainer.engines.base import PRECISIONS, set_recompute
from crysforge.trainer.loop.averages import total_over_ranks, weighted_loss
from crysforge.trainer.stages.base import STAGES
from tests.devices import DEVICE, needs_triton

CASES = [
    ("vae", "pddformer", "none", "grouped"),
    ("vae", "matformer", "none", "grouped"),
    ("vae", "icomformer", "none", "grouped"),
    ("joint", "pddformer", "none", "grouped"),
    ("joint", "pddformer", "cheap", "jagged"),  # what a GPU takes
]

pytestmark = needs_triton


def step(stage, batch, choice, precision):
    """Losses and gradients of a step, each a vector in fp64."""
    stage.zero_grad(set_to_none=True)
    kind = PRECISIONS[precision]
    with kernels.using(choice):
        with torch.autocast(DEVICE.type, kind, enabled=kind is not None):
            terms = stage(batch)
        sums = total_over_ranks(terms, (), World(device=DEVICE))
        weighted_loss(terms, sums, stage.weights, World(device=DEVICE))[0].backward()
    assert all(p.grad.dtype == p.dtype for p in stage.parameters())
    losses = torch.stack([t.total.double() for t in terms.values()])
    return losses, torch.cat([p.grad.double().flatten() for p in stage.parameters()])


@pytest.mark.parametrize(("name", "encoder", "recompute", "attention"), CASES)
def test_a_step_is_that_of_the_definitions(name, encoder, recompute, attention, random_crystal):
    """In fp32 up to rounding; in bf16 as near to fp32 as the definitions in bf16 are."""
    torch.manual_seed(0)
    dit = DiTConfig(width=16, layers=1, heads=2, attention=attention)
    settings = {"dit": dit} if name == "joint" else {}
    small = build_encoder({"name": encoder, "tiny": True, "layers": 2})
    stage = STAGES[name](STAGES[name].Config(**settings), small).to(DEVICE).train()
    for parameter in stage.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    rng = np.random.default_rng(0)
    samples = [Sample.clean(random_crystal(rng, n, str(n)), rng_key=n) for n in (3, 1, 2)]
    batch = build(samples, stage.encoder.graph, transform=stage.transform()).to(DEVICE)

    exact = step(stage, batch, "torch", "fp32")
    set_recompute(stage, recompute, DEVICE)
    for precision, tolerance in (("fp32", 1e-4), ("bf16", None)):
        plain, ours = (step(stage, batch, choice, precision) for choice in ("torch", "triton"))
        for found, other, true in zip(ours, plain, exact, strict=True):
            rounding = float((other - true).norm() / true.norm())
            error = float((found - true).norm() / true.norm())
            assert error < (tolerance or 2 * rounding + 0.01)
