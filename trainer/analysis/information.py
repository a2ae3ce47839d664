"""Mutual information between latents and structure, as a lower bound that a small network learns
(MINE, Belghazi et al. 2018): the Donsker–Varadhan bound, in nats.

The network learns on 60 % of the pairs and stops where 20 % say; the bound is taken on the other
20 %, so it can be too low but not high by what was learned by heart. A bound from n pairs says
little above ln n.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

SHUFFLES = 20
"""Draws of unpaired rows behind the bound."""


def mutual_information(
    x: np.ndarray,
    y: np.ndarray,
    seeds: int = 3,
    steps: int = 600,
    batch: int = 512,
    width: int = 128,
) -> dict[str, float]:
    """`nats`, mean over the seeds, and `std` over them, of I(x; y) for paired rows [n, …]."""
    inputs = [torch.from_numpy(_standard(a)).float() for a in (x, y)]
    found = [_bound(inputs[0], inputs[1], seed, steps, batch, width) for seed in range(seeds)]
    return {
        "nats": float(np.mean(found)),
        "std": float(np.std(found, ddof=1)) if seeds > 1 else 0.0,
        "pairs": len(x),
        "ceiling": math.log(len(x)),
    }


def _standard(a: np.ndarray) -> np.ndarray:
    return (a - a.mean(0)) / (a.std(0) + 1e-9)


def _bound(x: Tensor, y: Tensor, seed: int, steps: int, batch: int, width: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    learn, stop, judge = order.tensor_split([int(0.6 * len(x)), int(0.8 * len(x))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(x.shape[1] + y.shape[1], width),
            nn.ELU(),
            nn.Linear(width, width),
            nn.ELU(),
            nn.Linear(width, 1),
        )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    best, kept = -math.inf, {k: v.clone() for k, v in network.state_dict().items()}
    for step in range(steps):
        rows = learn[torch.randint(len(learn), (min(batch, len(learn)),), generator=generator)]
        other = rows[torch.randperm(len(rows), generator=generator)]
        loss = -_donsker_varadhan(network, x[rows], y[rows], y[other][None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            value = _judged(network, x[stop], y[stop], seed, 4)
            if value > best:
                best, kept = value, {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(kept)
    return max(0.0, _judged(network, x[judge], y[judge], seed + 1, SHUFFLES))


def _judged(network: nn.Module, x: Tensor, y: Tensor, seed: int, shuffles: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    others = torch.stack([y[torch.randperm(len(y), generator=generator)] for _ in range(shuffles)])
    with torch.no_grad():
        return float(_donsker_varadhan(network, x, y, others))


def _donsker_varadhan(network: nn.Module, x: Tensor, y: Tensor, others: Tensor) -> Tensor:
    """E[T(x, y)] − ln E[exp T(x, y')], of pairs and of unpaired rows [k, n, …]."""
    joint = network(torch.cat([x, y], 1)).mean()
    apart = network(torch.cat([x.expand(len(others), *x.shape), others], 2)).flatten()
    return joint - (torch.logsumexp(apart, 0) - math.log(len(apart)))
