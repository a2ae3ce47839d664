"""Transforms of a crystal's graph: edges left out, pairs counted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from crysforge.datapipe.graphs.neighbours import Neighbours
from crysforge.datapipe.graphs.transforms import Sample, Step


@dataclass(frozen=True)
class DropEdges(Step):
    """Leaves a random share of the edges out of the graph (see `drop_edges`)."""

    share: float

    def on_graph(
        self, graph: Neighbours, sample: Sample, rng: np.random.Generator
    ) -> tuple[Neighbours, Sample]:
        return drop_edges(graph, self.share, rng), sample


@dataclass(frozen=True)
class CountPairEdges(Step):
    """Says how many edges join each pair of atoms: extras `pair_edges` [n²] uint8, edges from atom
    j into atom i in row i·n + j, 255 where there are more."""

    def on_graph(
        self, graph: Neighbours, sample: Sample, rng: np.random.Generator
    ) -> tuple[Neighbours, Sample]:
        return graph, replace(sample, extras={**sample.extras, "pair_edges": _pair_edges(graph)})


def drop_edges(graph: Neighbours, share: float, rng: np.random.Generator) -> Neighbours:
    """The graph without a random share of its edges, which go in both directions at once;
    `floor(share · undirected edges)` of them, chosen without replacement."""
    edges = graph.edges.astype(np.int64)
    target, source, shell, count = edges[0], edges[1], edges[2], edges[3]
    entry = np.repeat(np.arange(len(count)), count)
    copy = np.arange(len(entry)) - np.repeat(np.cumsum(count) - count, count)
    # Brings both directions of an edge together: same atoms, same length, opposite vectors.
    columns = [copy, shell[entry], np.minimum(source, target)[entry]]
    columns.append(np.maximum(source, target)[entry])
    if graph.vectors is not None:
        columns = [copy, *_one_way(target, source, graph.vectors)[entry].T, *columns[1:]]
    both = entry[np.lexsort(columns)].reshape(-1, 2)
    kept = np.ones(len(both), dtype=bool)
    kept[rng.choice(len(both), size=int(share * len(both)), replace=False)] = False
    edges[3] = np.bincount(both[kept].ravel(), minlength=len(count))
    some = edges[3] > 0
    vectors = None if graph.vectors is None else graph.vectors[some]
    return replace(graph, edges=edges[:, some].astype(graph.edges.dtype), vectors=vectors)


def _one_way(target: np.ndarray, source: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Vectors [e, 3], in whole 1e-3 Å, of the edges gone from the lower atom to the higher; where
    both are one atom, so that the first component that is not zero is positive. The offset keeps
    round numbers off the boundary between two whole ones."""
    first = vectors[np.arange(len(vectors)), (np.abs(vectors) > 1e-3).argmax(axis=1)]
    turned = np.where(target == source, first < 0, target < source)
    return np.rint(np.where(turned[:, None], -vectors, vectors) * 1000 + 0.123)


def _pair_edges(graph: Neighbours) -> np.ndarray:
    """[n²] uint8: edges from atom j into atom i in row i·n + j, 255 where there are more."""
    edges, n = graph.edges.astype(np.int64), graph.num_atoms
    joining = np.bincount(edges[0] * n + edges[1], weights=edges[3], minlength=n * n)
    return np.minimum(joining, 255).astype(np.uint8)
