"""Training step of stage 2's denoiser: tokens padded, as published, against packed tokens.

    python benchmarks/stage2_step.py data=DIR              a data set made by launch/prepare.py
    … size=B batch_size=64 longest=22 atoms=9 threads=2 repeats=3

`padded` is the definition: all crystals padded to `longest` tokens (0: the longest of the batch),
dense attention with a key mask, one modulation row per crystal. `packed` is the product's path.
Both share their weights and run in alternation, forward and backward, on the atom numbers of a
batch of the data set, or of crystals of `atoms` atoms; times are medians, of wall time and of the
processor's, which other work on the machine changes less and gives `cpu_ratio`. `encoder`
adds the encoder, on quotient graphs, to the packed step: the whole stage. The last line is the
table as JSON.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tables import show
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.models.denoisers.dit import SIZES, DiT, index_embedding
from crysforge.models.encoders import build_encoder
from crysforge.models.layers.time_embedding import time_embedding
from crysforge.models.ops.modulation import EPS
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory; not needed with `atoms`."""
    size: str = "B"
    """Size of the DiT."""
    layers: int = 0
    """Blocks, instead of those of the size; the ratio hardly depends on them."""
    dim: int = 256
    """Width of the latents."""
    batch_size: int = 64
    """Crystals in the batch, spread evenly over the data set."""
    atoms: int = 0
    """Atoms of every crystal, instead of those of the data set."""
    longest: int = 0
    """Tokens the padded path pads to; 0: the longest crystal of the batch."""
    encoder: str = ""
    """Encoder whose step, on the same crystals, is added to the packed one."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 3
    """Steps of each kind after one to warm up."""


def padded(model: DiT, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """The denoiser on padded tokens: x [B, N, dim], t [B], mask [B, N] → [B, N, dim]."""
    width, heads = model.config.width, model.config.heads

    def modulated(u: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(u, (width,), eps=EPS) * (1 + scale[:, None]) + shift[:, None]

    h = model.input(x) + index_embedding(torch.arange(x.shape[1]), width)
    c = F.silu(model.time(time_embedding(t)))
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).chunk(6, dim=1)
        qkv = block.qkv(modulated(h, shift1, scale1))
        q, k, v = qkv.view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        h = h + gate1[:, None] * block.project(seen.transpose(1, 2).flatten(2))
        h = h + gate2[:, None] * block.mlp(modulated(h, shift2, scale2))
    shift, scale = model.final_modulation(c).chunk(2, dim=1)
    return model.output(modulated(h, shift, scale)) * mask[..., None]


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    if config.size not in SIZES:
        raise ValueError(f"unknown size {config.size!r}: {nearest(config.size, SIZES)}")
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    sizes, crystals = [config.atoms] * config.batch_size, []
    if not config.atoms:
        required(config, "data")
        dataset = Dataset.open(config.data)
        chosen = np.unique(np.linspace(0, len(dataset) - 1, config.batch_size).astype(int))
        crystals = [c for _, c in dataset.read(chosen) if isinstance(c, Crystal)]
        sizes = [len(c) for c in crystals]
    longest = config.longest or max(sizes)
    if longest < max(sizes):
        raise ValueError(f"longest={longest}, but a crystal has {max(sizes)} atoms")
    size = SIZES[config.size]
    model = DiT(replace(size, layers=config.layers or size.layers), config.dim)
    for parameter in model.parameters():  # as at the start all outputs would be zero
        torch.nn.init.normal_(parameter, std=0.02)
    count = torch.tensor(sizes)
    batch, ptr = torch.arange(len(sizes)).repeat_interleave(count), F.pad(count.cumsum(0), (1, 0))
    x, t = torch.randn(sum(sizes), config.dim), torch.rand(len(sizes))
    mask = torch.arange(longest) < count[:, None]
    dense = x.new_zeros(len(sizes), longest, config.dim)
    dense[mask] = x
    encoder = graphs = None
    if config.encoder and crystals:
        encoder = build_encoder({"name": config.encoder}).train()
        graphs = build(crystals, encoder.graph)

    def step(path: str) -> Tensor:
        model.zero_grad(set_to_none=True)
        if path == "padded":
            out = padded(model, dense, t, mask)[mask]
        else:
            z = x
            if path == "packed with encoder":
                encoder.zero_grad(set_to_none=True)
                z = x + F.linear(encoder(graphs), torch.eye(config.dim, encoder.dim))
            out = model(z, t, batch, ptr, sizes)
        (out - x).square().mean().backward()
        return out.detach()

    paths = ["padded", "packed"] + ["packed with encoder"] * (encoder is not None)
    first, second = step("padded"), step("packed")
    difference = float((first - second).abs().max() / first.abs().max())
    taken: dict[str, list[float]] = {path: [] for path in paths}
    worked: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(config.repeats):
        for path in paths:
            began, cpu = time.perf_counter(), time.process_time()
            step(path)
            taken[path].append(time.perf_counter() - began)
            worked[path].append(time.process_time() - cpu)
    base, cpu = (statistics.median(x["padded"]) for x in (taken, worked))
    rows = []
    for path, times in taken.items():
        median = statistics.median(times)
        rows.append(
            {
                "path": path,
                "tokens": len(sizes) * longest if path == "padded" else sum(sizes),
                "ms": 1e3 * median,
                "spread_ms": 1e3 * (max(times) - min(times)),
                "crystals_per_s": len(sizes) / median,
                "ratio": base / median,
                "cpu_ratio": cpu / statistics.median(worked[path]),
            }
        )
    about = {
        "size": config.size,
        "layers": len(model.blocks),
        "crystals": len(sizes),
        "longest": longest,
    }
    show(rows, {**about, "threads": config.threads, "difference": difference})


if __name__ == "__main__":
    run(main)
