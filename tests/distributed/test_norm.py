"""Two processes that share a batch compute what one process computes with all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.models.encoders import build_encoder
from crysforge.models.ops.norm import BatchNorm
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

CUTS = {"even": [0, 6, 12], "one rank has no rows": [0, 12, 12], "one row each": [0, 1, 2]}


def rows(n: int):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, dtype=torch.float64, generator=g) * 2 + 50
    return x, torch.randint(1, 4, (n,), generator=g), torch.randn(n, 3, generator=g)


def norm_of(part: slice, n: int) -> dict:
    """Output, gradients and running statistics of the rows of a part; used twice in one graph."""
    x, count, upstream = (t[part] for t in rows(n))
    norm = BatchNorm(3).double()
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    y = norm(norm(x, count) * x, count)
    (y * upstream).sum().backward()
    return {
        "rows": [y.tolist(), x.grad.tolist()],
        "sums": [norm.weight.grad.tolist(), norm.bias.grad.tolist()],
        "same": [norm.running_mean.tolist(), norm.running_var.tolist()],
    }


def crystals() -> list[Crystal]:
    rng = np.random.default_rng(0)
    corners = np.indices((2, 2, 2)).reshape(3, -1).T / 2
    return [
        Crystal.create(str(n), rng.integers(1, 90, n), corners[:n], (4 + n / 4) * np.eye(3))
        for n in (1, 3, 8, 5)
    ]


def encoder_of(part: slice, name: str) -> dict:
    """Latents, gradients and buffers of the crystals of a part."""
    torch.manual_seed(0)
    encoder = build_encoder({"name": name, "tiny": True}).double().train()
    batch = build(crystals()[part], encoder.graph)
    batch = batch.map_tensors(lambda t: t.double() if t.is_floating_point() else t)
    latents = encoder(batch)
    latents.pow(3).sum().backward()
    return {
        "rows": [latents.tolist()],
        "sums": [p.grad.tolist() for p in encoder.parameters()],
        "same": [b.tolist() for b in encoder.buffers()],
    }


def every_case() -> list:
    """Runs on a rank: all cases, in one start of the processes."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = []
    for cuts in CUTS.values():
        results.append(norm_of(slice(cuts[rank], cuts[rank + 1]), cuts[-1]))
    for name in ("pddformer", "matformer"):
        results.append(encoder_of(slice(2 * rank, 2 * rank + 2), name))
    try:
        BatchNorm(3)(torch.randn(1 - rank, 3))
    except ValueError as error:
        results.append(str(error))
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[list]:
    return run_ranks("tests.distributed.test_norm:every_case", 2)


@pytest.mark.parametrize("case", range(5), ids=[*CUTS, "pddformer", "matformer"])
def test_two_ranks_are_one(two_ranks, case):
    cuts = [*CUTS.values()]
    if case < len(cuts):
        whole = norm_of(slice(None), cuts[case][-1])
    else:
        whole = encoder_of(slice(None), ("pddformer", "matformer")[case - len(cuts)])
    first, second = (rank[case] for rank in two_ranks)
    for kind, expected in whole.items():
        for i, value in enumerate(expected):
            a, b = (torch.tensor(r[kind][i], dtype=torch.float64) for r in (first, second))
            expected_value = torch.tensor(value, dtype=torch.float64)
            if kind == "rows":
                together = torch.cat([x.view(-1, expected_value.shape[1]) for x in (a, b)])
            elif kind == "sums":
                together = a + b
            else:
                assert torch.equal(a, b)  # no rank drifts away
                together = a
            scale = max(1.0, float(expected_value.abs().max()))
            torch.testing.assert_close(together, expected_value, rtol=1e-9, atol=1e-9 * scale)


def test_one_row_in_the_whole_world_is_an_error_on_every_rank(two_ranks):
    for results in two_ranks:
        assert "more than one row" in results[-1]
