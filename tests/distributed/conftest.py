"""A small data set for the jobs, synthetic prototype crystals, and what tries faults on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crysforge.datapipe.crystals.prototypes import TARGETS, UNITS, prototypes
from crysforge.datapipe.storage.dataset import DatasetWriter
from tests.distributed.faults import Server
from tests.distributed.trials import Bench


def write_data(root: Path) -> Path:
    """160 crystals to train on, in three shards, 20 to validate and 20 to test."""
    with DatasetWriter(root, list(TARGETS), units=dict(UNITS), shard_size=64) as writer:
        for i, crystal in enumerate(prototypes(size=200, seed=0)):
            writer.add("test" if i % 10 == 9 else "val" if i % 10 == 8 else "train", crystal)
        writer.finish({"source": "synthetic prototypes"})
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "prototypes")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def bench(server, data, tmp_path_factory) -> Bench:
    return Bench(server, data, tmp_path_factory.mktemp("bench"))
