"""The facts of a job and its stages that must be the same on all of its ranks."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch

from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.storage.manifest import Manifest
from crysforge.models.encoders import ENCODERS
from crysforge.trainer.base.tensors import code_version
from crysforge.trainer.stages.base import Stage

MAY_DIFFER = {
    "data", "init_from",  # paths; what is there is compared
    "loader.cache_dir", "loader.cache_gb", "loader.cache_mb", "loader.prefetch", "loader.timeout_s",
    "loader.tries", "loader.workers",
}  # fmt: skip
"""Settings that may differ from rank to rank, being a machine's own: they change nothing in what is
learned."""
LIBRARIES = (
    "torch", "numpy", "scipy", "deepspeed", "triton", "webdataset", "safetensors", "omegaconf",
    "pymatgen",
)  # fmt: skip


def job_facts(config: Any, manifest: Manifest) -> dict[str, Any]:
    """What ranks must have alike before a job starts: settings, data, code, libraries.

    Args:
        config: the job's config.
        manifest: of its data set.
    """
    facts = {k: v for k, v in flat(dataclasses.asdict(config)).items() if k not in MAY_DIFFER}
    facts["init_from"] = "given" if config.init_from else "none"
    facts |= {"the data's fingerprint": manifest.fingerprint}
    facts |= {"the data's index": manifest.index_sha256}
    facts |= {f"the code's {k}": v for k, v in code_version().items() if k != "commit"}
    facts["Python"] = platform.python_version()
    for name in LIBRARIES:
        facts[name] = None
        with suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    facts["CUDA"] = torch.version.cuda
    facts["CRYSFORGE_KERNELS"] = os.environ.get("CRYSFORGE_KERNELS", "auto")
    return facts


def stage_facts(stage: Stage, tag: str, steps: int, train: Stream) -> dict[str, Any]:
    """What ranks must have alike before a stage is trained.

    Args:
        tag: checkpoint it goes on from, if any.
        steps: optimiser steps in all.
    """
    section = stage.encoder.section
    facts = {"the stage": stage.name, "the checkpoint": tag or None, "the stage's steps": steps}
    facts |= {f"encoder.{k}": v for k, v in flat(section).items()}
    facts |= {"the encoder's plug-in": ENCODERS.origin(section["name"]) or None}
    facts |= {"crystals": train.epoch_size, "loader.lanes": train.plan.num_lanes}
    return facts | {"position": train.position}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping, keys joined by dots."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
