"""What a job starts from: an encoder, fresh or of another run, and what that has learned from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from crysforge.datapipe.crystals.cells import PRIMITIVE, cells_of
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import Manifest
from crysforge.models.encoders import Encoder, build_encoder
from crysforge.models.encoders.base import for_primitive_cells, with_ties
from crysforge.trainer.base.command_line import read_yaml
from crysforge.trainer.jobs.schemas import JobConfig
from crysforge.trainer.runs.model_directory import (
    lineage,
    open_model,
    take_encoder,
)


def seed_everything(seed: int, purpose: str) -> None:
    """Seeds torch's initialisation; depends on (seed, purpose) and not on what ran before."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def starting_encoder(config: JobConfig, dataset: Dataset) -> Encoder:
    """The encoder a job starts from: another run's (`init_from`) or a fresh one, which suits the
    cells of the data set."""
    if config.init_from:
        exported = open_model(config.init_from, config.init_stage)
        section: Mapping[str, Any] = config.encoder
        if config.graph.ties:
            section = with_ties(section or exported.encoder, config.graph.ties)
        return take_encoder(exported, section)
    seed_everything(config.seed, "encoder")
    fresh = suited(config.encoder, dataset.manifest)
    return build_encoder(with_ties(fresh, config.graph.ties))


def suited(section: Mapping[str, Any], manifest: Manifest) -> Mapping[str, Any]:
    """An encoder's section, with what suits the cells of a data set where it does not say."""
    primitive = cells_of(manifest.provenance).rule == PRIMITIVE
    return for_primitive_cells(section) if primitive else section


def graph_of(encoder: str, manifest: Manifest) -> GraphSpec:
    """The graph that a training on a data set asks for.

    Args:
        encoder: a name, or a config file (.yaml) with an `encoder` section.
    """
    if not encoder.endswith((".yaml", ".yml")):
        return build_encoder(suited({"name": encoder}, manifest)).graph
    section = read_yaml(encoder).get("encoder")
    if not section:
        raise ValueError(f"{encoder} has no section 'encoder'")
    return build_encoder(suited(section, manifest)).graph


def starting_lineage(config: JobConfig, dataset: Dataset) -> dict[str, Any] | None:
    """What a job starts from, see `lineage`.

    Raises:
        ValueError: it has seen the crystals that the job is to test on: it was trained on another
            fold of the same data set, itself or what it started from.
    """
    found = lineage(config.init_from, config.init_stage)
    _check_fold(dataset, found)
    return found


def _check_fold(dataset: Dataset, start: Mapping[str, Any] | None) -> None:
    while start:
        data = start.get("data") or {}
        if data.get("fingerprint") == dataset.manifest.fingerprint and dataset.fold is not None:
            seen = data.get("fold")
            if seen != dataset.fold:
                raise ValueError(
                    f"init_from was trained on fold {seen} of {dataset.root}, with crystals that "
                    f"fold {dataset.fold} tests on: start from one of fold={dataset.fold} (in a "
                    "suite: `per: [fold]`)"
                )
        start = start.get("start")
