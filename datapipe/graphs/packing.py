"""From samples and their cached geometry to one packed batch, as a plain or a quotient graph, and
back from a batch to crystals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.graphs.neighbours import Neighbours, neighbours
from crysforge.datapipe.graphs.quotient import classes, derive, mix, refine
from crysforge.datapipe.graphs.transforms import Sample, Transform
from crysforge.datapipe.schema import MASKED, CrystalBatch, GraphSpec

__all__ = ["Neighbours", "build", "neighbours", "pack", "unpack"]


def _neighbours(seen: Crystal, spec: GraphSpec, sample: Sample) -> Neighbours:
    try:
        return neighbours(seen, spec)
    except BadCrystal as error:
        raise BadCrystal(f"crystal {sample.crystal.id}: {error}", error.reason) from None


def build(
    samples: Sequence[Crystal | Sample],
    spec: GraphSpec,
    targets: Sequence[str] = (),
    quotient: bool = True,
    transform: Transform | None = None,
) -> CrystalBatch:
    """One batch from crystals (key 0) or samples: the transform's views, `neighbours`, `pack`."""
    ready = [s if isinstance(s, Sample) else Sample.clean(s) for s in samples]
    if transform is None:
        shown = [(s, _neighbours(s.seen, spec, s)) for s in ready]
    else:
        shown = []
        for s in ready:
            shown += transform.show(s, partial(_neighbours, spec=spec, sample=s))
    return pack([s for s, _ in shown], [g for _, g in shown], spec, targets, quotient)


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
            without depth, or that cuts ties, has no quotient, whatever this says. On a plain graph
            an edge of multiplicity 2 is there twice.

    Raises:
        ValueError: no samples, or geometry that belongs to other crystals.
    """
    if not samples:
        raise ValueError("a batch needs at least one crystal")
    atoms = [g.num_atoms for g in neighbours]
    if [len(s.seen) for s in samples] != atoms:
        raise ValueError("the neighbours are not those of the samples: numbers of atoms differ")
    neighbours = [g.with_pairs() for g in neighbours]
    ptr, batch = _ptr(atoms), np.repeat(np.arange(len(samples)), atoms)
    masked = np.concatenate([s.masked for s in samples])
    seen = np.where(masked, MASKED, _join([s.seen.numbers for s in samples]))
    row_ptr = _ptr([len(g.pdd) for g in neighbours])
    row = _join([g.pdd_row for g in neighbours]) + row_ptr[batch]

    edges = _edges(neighbours, ptr)
    if quotient and spec.depth is not None and not spec.cut_ties:
        edges, first, node_of_atom = _quotient(edges, row, seen, spec.depth)
        vectors = None
    else:
        first = node_of_atom = np.arange(len(batch))
        vectors = _vectors(neighbours, edges.count) if spec.vectors else None
        edges = edges.repeated()

    share = _share(seen, batch, len(samples))
    arrays = {
        "numbers": _join([s.crystal.numbers for s in samples]),
        "masked": masked,
        **_geometry(samples),
        "batch": batch,
        "ptr": ptr,
        **_nodes(samples, first, node_of_atom, batch, ptr),
        "node_numbers": seen[first],
        "pdd": _pdd(spec, neighbours, row[first], share[first]),
        "edge_index": np.stack([edges.source, edges.target]),
        "edge_ptr": _ptr(np.bincount(edges.target, minlength=len(first))),
        "edge_multiplicity": edges.count.astype(np.float32),
        "edge_distance_row": edges.row,
        "distances": np.concatenate([g.distances for g in neighbours]),
        **({} if vectors is None else {"edge_vector": vectors}),
        **_optional(neighbours),
    }
    most_edges, edge_pairs = edges.on_host(len(first))
    names = samples[0].extras
    extras = {k: np.concatenate([s.extras[k] for s in samples]) for k in names}
    fields: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return CrystalBatch(
        **fields,
        targets=_labels(samples, targets),
        extras={name: torch.from_numpy(rows) for name, rows in extras.items()},
        ids=[s.crystal.id for s in samples],
        atoms_per_crystal=list(atoms),
        most_edges=most_edges,
        edge_pairs=edge_pairs,
    )


def unpack(batch: CrystalBatch) -> list[Crystal]:
    """The crystals of a batch, clean and with their labels: the inverse of `pack` to float32, so
    that distances of a graph made of them anew may be two float32 steps off."""
    ends = batch.ptr.tolist()
    numbers, frac, lattice = (
        x.cpu().double().numpy() for x in (batch.numbers, batch.frac_coords, batch.lattice)
    )
    labels = {name: values.tolist() for name, values in batch.targets.items()}
    return [
        Crystal.create(
            id,
            numbers[start:end].astype(np.int64),
            frac[start:end],
            lattice[i],
            {name: values[i] for name, values in labels.items()},
        )
        for i, (id, start, end) in enumerate(zip(batch.ids, ends[:-1], ends[1:], strict=True))
    ]


@dataclass(frozen=True)
class _EdgeArrays:
    """[E] each, sorted by target."""

    target: np.ndarray
    source: np.ndarray
    row: np.ndarray
    """Of the distinct distances."""
    count: np.ndarray
    """Equal edges that each one stands for."""

    def repeated(self) -> _EdgeArrays:
        """Every edge as often as it counts."""
        target, source, row = (
            np.repeat(x, self.count) for x in (self.target, self.source, self.row)
        )
        return _EdgeArrays(target, source, row, np.ones(len(target), dtype=np.int64))

    def on_host(self, nodes: int) -> tuple[int, int]:
        """Most edges into a node or out of one, and pairs of edges i → j, j → k."""
        into, out = (np.bincount(end, minlength=nodes) for end in (self.target, self.source))
        return int(max(into.max(), out.max())), int(into[self.source].sum())


def _edges(neighbours: Sequence[Neighbours], ptr: np.ndarray) -> _EdgeArrays:
    """The edges of all crystals, between atoms of the batch."""
    edges = [g.edges for g in neighbours]
    owner = np.repeat(np.arange(len(edges)), [e.shape[1] for e in edges])
    target, source, row, count = np.concatenate(edges, axis=1, dtype=np.int64, casting="unsafe")
    target += ptr[owner]
    source += ptr[owner]
    row += _ptr([len(g.distances) for g in neighbours])[owner]
    return _EdgeArrays(target, source, row, count)


def _quotient(
    edges: _EdgeArrays, row: np.ndarray, seen: np.ndarray, depth: int
) -> tuple[_EdgeArrays, np.ndarray, np.ndarray]:
    """Edges between classes of atoms, the first atom of each class, and the class of each atom."""
    edge_ptr = _ptr(np.bincount(edges.target, minlength=len(row)))
    seed = derive(row.astype(np.uint64), seen)  # a row belongs to one crystal
    colour = refine(seed, edges.source, edges.row, edges.count, edge_ptr, depth)
    first, node_of_atom = classes(colour)
    merged = _merge(edges.target, edges.source, edges.row, edges.count, first, node_of_atom)
    return _EdgeArrays(*merged), first, node_of_atom


def _geometry(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Coordinates and cells, clean and as seen."""
    clean, seen = [s.crystal for s in samples], [s.seen for s in samples]
    return {
        "frac_coords": np.concatenate([c.frac_coords for c in clean], dtype=np.float32),
        "lattice": np.stack([c.lattice for c in clean], dtype=np.float32),
        "seen_frac_coords": np.concatenate([c.frac_coords for c in seen], dtype=np.float32),
        "seen_lattice": np.stack([c.lattice for c in seen], dtype=np.float32),
    }


def _nodes(
    samples: Sequence[Sample],
    first: np.ndarray,
    node_of_atom: np.ndarray,
    batch: np.ndarray,
    ptr: np.ndarray,
) -> dict[str, np.ndarray]:
    """What a batch says of its nodes, and the keys of all randomness."""
    key = np.array([s.rng_key for s in samples], dtype=np.int64)
    node_batch, node_ptr = batch[first], np.searchsorted(first, ptr)
    local = np.arange(len(first)) - node_ptr[node_batch]
    # Hashed once more, so that no node key equals one that a stage derives from the crystal's.
    node_rng_key = derive(mix(key.astype(np.uint64))[node_batch], local).view(np.int64)
    return {
        "rng_key": key,
        "node_of_atom": node_of_atom,
        "node_multiplicity": np.bincount(node_of_atom, minlength=len(first)).astype(np.float32),
        "node_batch": node_batch,
        "node_ptr": node_ptr,
        "node_rng_key": node_rng_key,
    }


def _optional(neighbours: Sequence[Neighbours]) -> dict[str, np.ndarray]:
    """What only some specs ask for."""
    sums = [g.pair_sums for g in neighbours if g.pair_sums is not None]
    triples = [g.triple for g in neighbours if g.triple is not None]
    return {
        **({"pair_sums": np.concatenate(sums)} if sums else {}),
        **({"lattice_triple": np.stack(triples)} if triples else {}),
    }


def _labels(samples: Sequence[Sample], targets: Sequence[str]) -> dict[str, Any]:
    return {
        name: torch.tensor(
            [s.crystal.targets.get(name, np.nan) for s in samples], dtype=torch.float32
        )
        for name in targets
    }


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
