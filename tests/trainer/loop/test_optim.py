"""The schedule is torch's OneCycleLR; vectors are not decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crysforge.trainer.loop.optim import one_cycle, param_groups


@pytest.mark.parametrize("total", [3, 7, 100])
@pytest.mark.parametrize("pct_start", [0.3, 0.5])
def test_one_cycle_is_torchs(total, pct_start):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.02, total_steps=total, pct_start=pct_start
    )
    for step in range(total):
        group = optimizer.param_groups[0]
        lr, beta1 = one_cycle(step, total, 0.02, pct_start)
        assert lr == pytest.approx(group["lr"], rel=1e-9, abs=1e-12)
        assert beta1 == pytest.approx(group["betas"][0], rel=1e-9)
        optimizer.step()
        if step < total - 1:
            schedule.step()


def test_one_cycle_of_one_step_is_finite():
    lr, beta1 = one_cycle(0, 1, 0.02)
    assert 0 < lr <= 0.02
    assert 0.85 <= beta1 <= 0.95


def test_groups_cover_each_parameter_once_and_spare_vectors():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net[2].weight.requires_grad_(False)
    groups = param_groups(net, 0.1, {"0.": 0.5})
    members = [p for g in groups for p in g["params"]]
    assert {id(p) for p in members} == {id(p) for p in net.parameters() if p.requires_grad}
    assert len(members) == 5
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
            assert group["lr_scale"] == (
                0.5 if p.shape[0] == 4 and p is not net[1].weight and p is not net[1].bias else 1.0
            )
