"""Graphs that a data set carries: read instead of built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS
from crysforge.datapipe.graphs.neighbours import Neighbours
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.storage.record import Tensors

VERSION = 1
"""Raised whenever `neighbours` gives another result for a crystal: then what was baked before is
not taken any more."""


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

    def __init__(self, spec: GraphSpec, max_pairs: int = MAX_PAIRS) -> None:
        self.spec, self.key, self.max_pairs = spec, graph_key(spec), max_pairs
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
            if (count := int(graph.edges[3].sum(dtype=np.int64))) > self.max_pairs:
                raise ValueError(f"it has {count} edges, more than max_pairs={self.max_pairs}")
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
