"""The largest batch is tried before the first step."""

from __future__ import annotations

import torch

from crysforge.datapipe.schema import CrystalBatch
from crysforge.trainer.base.distributed import World
from crysforge.trainer.engines.base import PRECISIONS, EngineConfig, set_recompute
from crysforge.trainer.loop.averages import peak_bytes, total_over_ranks, weighted_loss
from crysforge.trainer.stages.base import Stage


def try_batch(stage: Stage, batch: CrystalBatch, config: EngineConfig, world: World) -> str:
    """Forward and backward pass of a batch, without an update, before an engine is built; says how
    much memory the training step of such a batch takes. Weights, buffers and all later draws stay
    as they are.

    Raises:
        ValueError: the device's memory does not suffice.
    """
    device, dtype = world.device, PRECISIONS[config.precision]
    stage.to(device).train()
    set_recompute(stage, config.recompute, device)
    before = [b.clone() for b in stage.buffers()]
    size = f"{batch.num_crystals} crystals, {batch.num_atoms} atoms, {batch.num_edges} edges"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            terms = stage(batch.to(device))
        weighted_loss(terms, total_over_ranks(terms, (), world), stage.weights, world)[0].backward()
    except torch.OutOfMemoryError:
        raise ValueError(
            f"a batch of the largest crystals ({size} per rank) does not fit in the memory of "
            f"{device}: set loader.max_atoms below {batch.num_atoms}, or lower the batch size"
        ) from None
    finally:
        stage.zero_grad(set_to_none=True)
        with torch.no_grad():
            for live, kept in zip(stage.buffers(), before, strict=True):
                live.copy_(kept)
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    moments = 8 * trained / (world.size if config.zero_stage else 1)
    peak = (peak_bytes(device) + moments) / 1e9
    text = f"largest batch ({size} per rank): peak memory {peak:.3g} GB"
    if device.type == "cuda":
        text += f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.3g} GB"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return text
