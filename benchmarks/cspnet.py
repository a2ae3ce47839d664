"""CSPNet's exact fast form beside its plain definition: a training step and a network call.

    python benchmarks/cspnet.py data=DIR width=512 layers=6 batch=32

The two take turns on the same crystals, weights and threads; ratios are medians over rounds, of
processor time. The plain form puts all features of every ordered pair side by side, as the paper
and the released code do.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.denoisers.cspnet import CSPLayers
from crysforge.models.denoisers.pair_layout import PairLayout
from crysforge.trainer.base.command_line import parse, required


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings."""

    data: str = ""
    """Data set whose test crystals are taken."""
    width: int = 512
    layers: int = 6
    frequencies: int = 128
    batch: int = 32
    rounds: int = 5


def plain(net: CSPLayers, x: Tensor, frac: Tensor, lattice: Tensor, batch: Tensor) -> Tensor:
    """The definition."""
    i, j = torch.nonzero(batch[:, None] == batch[None], as_tuple=True)
    waves = 2 * math.pi * torch.arange(net.frequencies)
    degree = torch.bincount(i)[:, None]
    for layer in net.layers:
        h = layer.norm(x)
        angle = ((frac[j] - frac[i])[:, :, None] * waves).flatten(1)
        features = [h[i], lattice[batch[i]], h[j], angle.sin(), angle.cos()]
        message = layer.message(torch.cat(features, dim=1))
        message = F.silu(layer.message_out(F.silu(message)))
        mean = torch.zeros_like(h).index_add(0, i, message) / degree
        x = x + layer.update(torch.cat([h, mean], dim=1))
    return net.norm(x)


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data")
    torch.manual_seed(0)
    data = Dataset.open(config.data)
    items = data.split_items("test")
    found = [c for _, c in data.read(items[:: max(1, len(items) // config.batch)].tolist())]
    crystals = [c for c in found if isinstance(c, Crystal)][: config.batch]
    sizes = [len(c) for c in crystals]
    ptr = torch.tensor([0, *np.cumsum(sizes).tolist()])
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    frac = torch.tensor(np.concatenate([c.frac_coords for c in crystals]), dtype=torch.float32)
    net = CSPLayers(config.width, config.layers, config.frequencies, 9)
    x = torch.randn(len(batch), config.width)
    lattice = torch.randn(len(sizes), 9)

    def fast() -> Tensor:
        layout = PairLayout.of(batch, ptr, sizes)
        sort = layout.sort_atoms
        out = net.propagate(sort(x), sort(frac), layout.sort_crystals(lattice), layout)
        return layout.unsort_atoms(out)

    def slow() -> Tensor:
        return plain(net, x, frac, lattice, batch)

    def seconds(form, train: bool) -> float:
        began = time.process_time()
        if train:
            net.zero_grad()
            form().square().mean().backward()
        else:
            with torch.no_grad():
                form()
        return time.process_time() - began

    with torch.no_grad():
        a, b = fast(), slow()
    pairs = sum(n * n for n in sizes)
    print(f"{len(sizes)} crystals, {len(batch)} atoms, {pairs} pairs")
    print(f"{torch.get_num_threads()} threads; outputs differ by {(a - b).abs().max():.1e}")
    for name, train in (("training step (forward and backward)", True), ("network call", False)):
        rounds = [(seconds(slow, train), seconds(fast, train)) for _ in range(config.rounds + 1)]
        ratio = statistics.median(s / f for s, f in rounds[1:])
        took = [1e3 * statistics.median(r[k] for r in rounds[1:]) for k in (0, 1)]
        print(f"{name}: plain {took[0]:.0f} ms, fast {took[1]:.0f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
