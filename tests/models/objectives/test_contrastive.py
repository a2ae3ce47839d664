"""Losses that compare crystals with each other are their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crysforge.models.objectives.contrastive import barlow_twins, nt_xent


def test_nt_xent_is_its_definition():
    torch.manual_seed(0)
    x, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 2, 1, 0])
    unit = F.normalize(x, dim=1)
    total, anchors = 0.0, 0
    for a in range(6):
        positives = [p for p in range(6) if p != a and labels[p] == labels[a]]
        negatives = [n for n in range(6) if labels[n] != labels[a]]
        if positives:
            anchors += 1
            s = (unit @ unit[a] / 0.1).exp()
            rest = s[negatives].sum()
            total += sum(-torch.log(s[p] / (s[p] + rest)) for p in positives) / len(positives)
    found, count = nt_xent(x, labels, 0.1)
    torch.testing.assert_close(found, total)
    assert count == anchors == 5


@pytest.mark.parametrize("labels", [[0, 1, 2], [4, 4, 4]])
def test_nt_xent_without_positives_or_negatives_is_zero(labels):
    x = torch.randn(3, 4, requires_grad=True)
    total, count = nt_xent(x, torch.tensor(labels), 0.07)
    total.backward()
    assert total == 0 and torch.isfinite(x.grad).all()
    assert count == (3 if len(set(labels)) == 1 else 0)


def test_barlow_is_its_definition():
    torch.manual_seed(0)
    views = [torch.randn(9, 4), torch.randn(9, 4)]
    norm = nn.BatchNorm1d(4, affine=False)
    first, second = (norm(F.normalize(v, dim=1)) for v in views)
    c = first.T @ second / 9
    eye = torch.eye(4, dtype=torch.bool)
    expected = (c[eye] - 1).square().sum() + 0.3 * c[~eye].square().sum()
    total, count = barlow_twins(*views, 0.3)
    assert count == 9
    torch.testing.assert_close(total / count, expected)
