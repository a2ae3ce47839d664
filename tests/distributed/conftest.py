"""A small data set for the jobs: synthetic prototype crystals."""

from __future__ import annotations

from pathlib import Path

import pytest

from datapipe.prototypes import TARGETS, UNITS, prototypes
from datapipe.shards import DatasetWriter


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "prototypes"
    with DatasetWriter(root, list(TARGETS), units=dict(UNITS), shard_size=64) as writer:
        for i, crystal in enumerate(prototypes(size=200, seed=0)):
            writer.add("test" if i % 10 == 9 else "val" if i % 10 == 8 else "train", crystal)
        writer.finish({"source": "synthetic prototypes"})
    return root
