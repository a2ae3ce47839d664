"""Graphs that are stored with their crystals, so that a loader reads them and builds none.

They belong to the rule that made them: a reader takes those whose key is that of the graph its
encoder asks for, and builds all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.graphs.neighbours import neighbours
from crysforge.datapipe.graphs.stored import StoredGraphs, graph_key
from crysforge.datapipe.preparing.edit_configs import BakeConfig
from crysforge.datapipe.preparing.request import made_before, request_of
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.datapipe.storage.manifest import SPLITS, Manifest
from crysforge.datapipe.storage.record import Tensors


class Baker:
    """Builds the graphs of a crystal, in a worker process."""

    def __init__(self, specs: Iterable[GraphSpec], max_pairs: int) -> None:
        self.graphs = {graph_key(spec): StoredGraphs(spec) for spec in specs}
        self.max_pairs = max_pairs

    def __call__(self, crystal: Crystal) -> tuple[Crystal, Tensors | str]:
        """The crystal and its graphs, or why it has none."""
        tensors: Tensors = {}
        try:
            for stored in self.graphs.values():
                tensors |= stored.tensors(neighbours(crystal, stored.spec, self.max_pairs))
        except ValueError as error:
            return crystal, str(error)
        return crystal, tensors


_NO_REQUEST = ("output", "workers", "progress", "encoders")
"""Settings that change nothing in what is made; the graphs say what the encoders do."""


def bake(config: BakeConfig, specs: Iterable[GraphSpec]) -> Manifest:
    """Writes a data set with the graphs of its crystals under some specs.

    Raises:
        ValueError: no spec, a crystal that cannot be read or has no graph.
    """
    baker = Baker(specs, config.max_pairs)
    if not baker.graphs:
        raise ValueError("there is no graph to bake: name an encoder")
    dataset = Dataset.open(config.bake)
    manifest = dataset.manifest
    request = request_of(config, [manifest.fingerprint, *sorted(baker.graphs)], _NO_REQUEST)
    if done := made_before(config.output, request):
        return done
    units = {name: t.unit for name, t in manifest.targets.items() if t.unit}
    splits = [s for s in SPLITS for _ in range(manifest.splits[s])]
    size = config.shard_size or max(shard.count for shard in manifest.shards)
    with (  # processes first: they must not hold the writer's lock
        Workers(baker, config.workers) as workers,
        DatasetWriter(config.output, dataset.names, units, size, dataset.folds) as writer,
    ):
        results = zip(range(len(splits)), workers.map(_crystals(dataset)), strict=True)
        bar = tqdm(results, "baking", len(dataset), unit=" crystals", disable=not config.progress)
        for item, (crystal, tensors) in bar:
            if isinstance(tensors, str):
                raise ValueError(f"{dataset.root}: {crystal.id} has no graph: {tensors}")
            writer.add(splits[item], crystal, tensors, dataset.fold_of(item))
        graphs = {key: dataclasses.asdict(g.spec) for key, g in baker.graphs.items()}
        return writer.finish({**_provenance(dataset), "request": request}, graphs)


def _crystals(dataset: Dataset) -> Iterator[Crystal]:
    for _, crystal in dataset.read(range(len(dataset))):
        if isinstance(crystal, BadCrystal):
            raise ValueError(f"{dataset.root}: {crystal}; see all with verify={dataset.root}")
        yield crystal


def _provenance(dataset: Dataset) -> dict[str, Any]:
    source = {
        "name": Path(dataset.root.rstrip("/")).name,
        "format": "shards",
        "fingerprint": dataset.manifest.fingerprint,
        "provenance": dataset.manifest.provenance,
    }
    return {"action": "bake", "settings": {}, "sources": [source]}
