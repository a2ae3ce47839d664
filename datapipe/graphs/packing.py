"""From samples and their cached geometry to one packed batch, as a plain or a quotient graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.graphs.neighbours import Neighbours, neighbours
from crysforge.datapipe.graphs.quotient import classes, derive, mix, refine
from crysforge.datapipe.graphs.transforms import Sample
from crysforge.datapipe.schema import MASKED, CrystalBatch, GraphSpec

__all__ = ["Neighbours", "build", "drop_edges", "neighbours", "pack"]

_DROPPED = 1
"""Tells the draws of dropped edges from a transform's."""


def build(
    samples: Sequence[Crystal | Sample],
    spec: GraphSpec,
    targets: Sequence[str] = (),
    quotient: bool = True,
) -> CrystalBatch:
    """One batch from crystals (shown whole, key 0) or samples: `neighbours`, then `pack`."""
    ready = [s if isinstance(s, Sample) else Sample.clean(s) for s in samples]
    graphs = []
    for sample in ready:
        try:
            graphs.append(neighbours(sample.seen, spec))
        except BadCrystal as error:
            raise BadCrystal(f"crystal {sample.crystal.id}: {error}", error.reason) from None
    return pack(ready, graphs, spec, targets, quotient)


def pack(
    samples: Sequence[Sample],
    neighbours: Sequence[Neighbours],
    spec: GraphSpec,
    targets: Sequence[str] = (),
    quotient: bool = True,
) -> CrystalBatch:
    """One batch of samples whose geometry is known; `concat` of two batches equals the batch of
    both.

    Args:
        neighbours: of each sample's `seen` structure, under the same spec.
        targets: names of the labels to carry; a crystal without one gets NaN.
        quotient: merge atoms that an encoder of the spec's depth cannot tell apart. A spec
            without depth has no quotient, whatever this says. On a plain graph an edge of count
            2 is there twice.

    Raises:
        ValueError: no samples, or geometry that belongs to other crystals.
    """
    if not samples:
        raise ValueError("a batch needs at least one crystal")
    atoms = [g.num_atoms for g in neighbours]
    if [len(s.seen) for s in samples] != atoms:
        raise ValueError("the neighbours are not those of the samples: numbers of atoms differ")
    neighbours = [_thinned(g, s) for s, g in zip(samples, neighbours, strict=True)]
    crystals = [s.crystal for s in samples]
    every = np.arange(len(samples))
    ptr, batch = _ptr(atoms), np.repeat(every, atoms)
    numbers = _join([c.numbers for c in crystals])
    masked = np.concatenate([s.masked for s in samples])
    seen = np.where(masked, MASKED, _join([s.seen.numbers for s in samples]))
    key = np.array([s.key for s in samples], dtype=np.int64)
    labels = {k: np.concatenate([s.labels[k] for s in samples]) for k in samples[0].labels}
    if samples[0].pair_edges:
        labels["pair_edges"] = np.concatenate([_pair_edges(g) for g in neighbours])

    neighbours = [g.with_pairs() for g in neighbours]
    edges = [g.edges for g in neighbours]
    owner = np.repeat(every, [e.shape[1] for e in edges])
    target, source, shell, count = np.concatenate(edges, axis=1, dtype=np.int64, casting="unsafe")
    target += ptr[owner]
    source += ptr[owner]
    shell += _ptr([len(g.distances) for g in neighbours])[owner]
    row_ptr = _ptr([len(g.pdd) for g in neighbours])
    row = _join([g.pdd_row for g in neighbours]) + row_ptr[batch]

    if quotient and spec.depth is not None:
        edge_ptr = _ptr(np.bincount(target, minlength=len(batch)))
        seed = derive(row.astype(np.uint64), seen)  # a row belongs to one crystal
        colour = refine(seed, source, shell, count, edge_ptr, spec.depth)
        first, node_of_atom = classes(colour)
        target, source, shell, count = _merge(target, source, shell, count, first, node_of_atom)
        vectors = None
    else:
        first = node_of_atom = np.arange(len(batch))
        target, source, shell = (np.repeat(x, count) for x in (target, source, shell))
        vectors = _vectors(neighbours, count) if spec.vectors else None
        count = np.ones(len(target), dtype=np.int64)

    into, out = (np.bincount(end, minlength=len(first)) for end in (target, source))
    node_batch = batch[first]
    node_ptr = np.searchsorted(first, ptr)
    local = np.arange(len(first)) - node_ptr[node_batch]
    # Mixed first, so that a node's key is none that a stage derives from the crystal's by a salt.
    node_key = derive(mix(key.astype(np.uint64))[node_batch], local).view(np.int64)

    arrays = {
        "numbers": numbers,
        "masked": masked,
        "frac_coords": np.concatenate([c.frac_coords for c in crystals], dtype=np.float32),
        "lattice": np.stack([c.lattice for c in crystals], dtype=np.float32),
        "seen_frac_coords": np.concatenate([s.seen.frac_coords for s in samples], dtype=np.float32),
        "seen_lattice": np.stack([s.seen.lattice for s in samples], dtype=np.float32),
        "batch": batch,
        "ptr": ptr,
        "key": key,
        "node_of_atom": node_of_atom,
        "node_numbers": seen[first],
        "node_count": np.bincount(node_of_atom, minlength=len(first)).astype(np.float32),
        "node_batch": node_batch,
        "node_ptr": node_ptr,
        "node_key": node_key,
        "pdd": _pdd(spec, neighbours, row[first], _share(seen, batch, len(samples))[first]),
        "edge_index": np.stack([source, target]),
        "edge_ptr": _ptr(into),
        "edge_count": count.astype(np.float32),
        "edge_shell": shell,
        "distances": np.concatenate([g.distances for g in neighbours]),
    }
    fields: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    fields["edge_vector"] = None if vectors is None else torch.from_numpy(vectors)
    if sums := [g.pair_sums for g in neighbours if g.pair_sums is not None]:
        fields["pair_sums"] = torch.from_numpy(np.concatenate(sums))
    if triples := [g.triple for g in neighbours if g.triple is not None]:
        fields["lattice_triple"] = torch.from_numpy(np.stack(triples))
    fields["targets"] = {
        name: torch.tensor([c.targets.get(name, np.nan) for c in crystals], dtype=torch.float32)
        for name in targets
    }
    fields["labels"] = {name: torch.from_numpy(rows) for name, rows in labels.items()}
    return CrystalBatch(
        **fields,
        ids=[c.id for c in crystals],
        sizes=list(atoms),
        most_edges=int(max(into.max(), out.max())),
        edge_pairs=int(into[source].sum()),
    )


def _thinned(graph: Neighbours, sample: Sample) -> Neighbours:
    """The graph that the sample asks for."""
    if sample.dropped_edges == 0:
        return graph
    rng = np.random.default_rng([sample.key, _DROPPED])
    return drop_edges(graph, sample.dropped_edges, rng)


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


def _merge(target, source, shell, count, first, node_of_atom):
    """Edges between classes: those into the first atom of each class, equal ones summed."""
    is_first = np.zeros(len(node_of_atom), dtype=bool)
    is_first[first] = True
    keep = np.flatnonzero(is_first[target])
    target, source = node_of_atom[target[keep]], node_of_atom[source[keep]]
    shell, count = shell[keep], count[keep]
    if len(keep) == 0:
        return target, source, shell, count
    # Sources count from the target, so that the key stays small in a long batch.
    away = source - target
    away -= away.min()
    key = (target * (away.max() + 1) + away) * (shell.max() + 1) + shell
    order = np.argsort(key)
    new = np.flatnonzero(np.diff(key[order], prepend=-1))
    first_of = order[new]
    return target[first_of], source[first_of], shell[first_of], np.add.reduceat(count[order], new)


def _share(seen: np.ndarray, batch: np.ndarray, crystals: int) -> np.ndarray:
    """[A] share of each atom in its crystal's sum of visible atomic numbers; 0 where masked."""
    total = np.bincount(batch, weights=seen, minlength=crystals)
    return seen / np.maximum(total, 1)[batch]


def _pdd(spec: GraphSpec, neighbours, row: np.ndarray, share: np.ndarray) -> np.ndarray:
    """[N, 1 + k] float32, or [N, 0] where the spec has no distance rows."""
    if spec.pdd == 0:
        return np.zeros((len(row), 0), dtype=np.float32)
    out = np.empty((len(row), 1 + spec.pdd), dtype=np.float32)
    out[:, 0] = share
    out[:, 1:] = np.concatenate([g.pdd for g in neighbours])[row]
    return out


def _vectors(neighbours, count: np.ndarray) -> np.ndarray:
    return np.repeat(np.concatenate([g.vectors for g in neighbours]), count, axis=0)


def _ptr(sizes) -> np.ndarray:
    """[m+1] int64: where each of m consecutive parts starts, then the end."""
    out = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=out[1:])
    return out


def _join(arrays) -> np.ndarray:
    return np.concatenate(arrays, dtype=np.int64, casting="unsafe")
