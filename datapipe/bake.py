"""Graphs that are stored with their crystals, so that a loader reads them and builds none.

They belong to the rule that made them: a reader takes those whose key is that of the graph its
encoder asks for, and builds all others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datapipe.crystal import BadCrystal, Crystal
from datapipe.manifest import SPLITS, Manifest
from datapipe.neighbours import Neighbours, neighbours
from datapipe.record import Tensors
from datapipe.schema import GraphSpec
from datapipe.shards import Dataset, DatasetWriter
from datapipe.sources.parallel import Workers

VERSION = 1
"""Raised whenever `neighbours` gives another result for a crystal: then what was baked before is
not taken any more."""


@dataclass(kw_only=True)
class BakeConfig:
    """Settings of `bake`."""

    bake: str = ""
    """Data set: directory or URL."""
    output: str = ""
    """Directory of the new data set."""
    shard_size: int | None = None
    """Crystals in a shard; None: as many as there are, so that the order of training is the
    same."""
    workers: int = 0
    """Processes that build graphs; 0: one for each core."""
    progress: bool = True
    """Whether to show a progress bar."""


def asked(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of a graph spec that a graph depends on: how deep a quotient is does not change
    the graph it is made of, nor do settings that ask for nothing."""
    return {k: v for k, v in spec.items() if k != "depth" and v not in (None, "none", False, 0)}


def graph_key(spec: GraphSpec) -> str:
    """Identifies the graphs of a spec: 12 hexadecimal digits."""
    text = json.dumps([VERSION, asked(dataclasses.asdict(spec))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class StoredGraphs:
    """The graphs of one spec as tensors of records: `<key>.edges`, `<key>.distances`, …, for what
    there is of a `Neighbours`."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec, self.key = spec, graph_key(spec)
        pairs = spec.pair_sums != "none"
        asked = {"vectors": spec.vectors, "triple": spec.lattice_triple}
        asked |= {"pair_sums": pairs, "pair_row": pairs}
        self._names = {name: f"{self.key}.{name}" for name in _SHAPES if asked.get(name, True)}

    def tensors(self, graph: Neighbours) -> Tensors:
        """A graph's tensors."""
        return {full: getattr(graph, name) for name, full in self._names.items()}

    def find(self, tensors: Mapping[str, np.ndarray], atoms: int) -> Neighbours | None:
        """The graph among the tensors of a record, if it is there.

        Raises:
            BadCrystal: it is no graph of so many atoms.
        """
        if self._names["edges"] not in tensors:
            return None
        try:
            graph = Neighbours(**{name: tensors[full] for name, full in self._names.items()})
            self._check(graph, atoms)
        except (KeyError, ValueError) as error:
            raise BadCrystal(
                f"the graph {self.key} that is stored with it is unsound: {error}: bake it again"
            ) from None
        return graph

    def _check(self, graph: Neighbours, atoms: int) -> None:
        """Raises ValueError if a number points at nothing, and would fail or go astray later."""
        sizes: dict[Any, int] = {"n": atoms, "k": self.spec.pdd, 3: 3, 4: 4}
        for name in self._names:
            array, (kind, shape) = getattr(graph, name), _SHAPES[name]
            if array.dtype.kind != kind or array.ndim != len(shape):
                raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
            for letter, size in zip(shape, array.shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    raise ValueError(f"{name} has shape {list(array.shape)} with {sizes}")
        target = graph.edges[0]
        if sizes["e"]:
            most = graph.edges.max(axis=1).tolist()
            if not (most[0] < atoms and most[1] < atoms and most[2] < sizes["u"]):
                raise ValueError(f"edges go up to {most}")
            if (target[1:] < target[:-1]).any():
                raise ValueError("edges are not sorted by target")
        if graph.pdd_row.max() >= sizes["r"]:
            raise ValueError(f"pdd has {sizes['r']} rows")
        if graph.pair_row is not None and graph.pair_row.max() >= sizes["s"]:
            raise ValueError(f"pair_sums has {sizes['s']} rows")
        if not math.isfinite(graph.distances.sum() + graph.pdd.sum()):
            raise ValueError("distances are not finite")


_SHAPES: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "edges": ("u", (4, "e")),
    "distances": ("f", ("u",)),
    "pdd": ("f", ("r", "k")),
    "pdd_row": ("u", ("n",)),
    "vectors": ("f", ("e", 3)),
    "triple": ("f", (3, 3)),
    "pair_sums": ("f", ("s",)),
    "pair_row": ("u", ("n", "n")),
}
"""Kind of numbers and shape of each array of `Neighbours`, in its letters."""


class Baker:
    """Builds the graphs of a crystal, in a worker process."""

    def __init__(self, specs: Iterable[GraphSpec]) -> None:
        self.graphs = {graph_key(spec): StoredGraphs(spec) for spec in specs}

    def __call__(self, crystal: Crystal) -> tuple[Crystal, Tensors | str]:
        """The crystal and its graphs, or why it has none."""
        tensors: Tensors = {}
        try:
            for stored in self.graphs.values():
                tensors |= stored.tensors(neighbours(crystal, stored.spec))
        except ValueError as error:
            return crystal, str(error)
        return crystal, tensors


def bake(config: BakeConfig, specs: Iterable[GraphSpec]) -> Manifest:
    """Writes a data set with the graphs of its crystals under some specs.

    Raises:
        ValueError: no spec, a crystal that cannot be read or has no graph.
    """
    baker = Baker(specs)
    if not baker.graphs:
        raise ValueError("there is no graph to bake: name an encoder")
    dataset = Dataset.open(config.bake)
    manifest = dataset.manifest
    units = {name: t.unit for name, t in manifest.targets.items() if t.unit}
    splits = [s for s in SPLITS for _ in range(manifest.splits[s])]
    size = config.shard_size or max(shard.count for shard in manifest.shards)
    with (  # processes first: they must not hold the writer's lock
        Workers(baker, config.workers) as workers,
        DatasetWriter(config.output, dataset.names, units, size) as writer,
    ):
        results = zip(splits, workers.map(_crystals(dataset)), strict=True)
        bar = tqdm(results, "baking", len(dataset), unit=" crystals", disable=not config.progress)
        for split, (crystal, tensors) in bar:
            if isinstance(tensors, str):
                raise ValueError(f"{dataset.root}: {crystal.id} has no graph: {tensors}")
            writer.add(split, crystal, tensors)
        graphs = {key: dataclasses.asdict(g.spec) for key, g in baker.graphs.items()}
        return writer.finish(_provenance(dataset), graphs)


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
