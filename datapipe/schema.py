"""The one contract between data and models: what a graph is (`GraphSpec`) and what a packed
batch holds (`CrystalBatch`).

Letters in shapes: A atoms, N nodes, E edges, B crystals, U distinct distances. Every key of a batch
says its shape, dtype and meaning; `concat`, moving, the wire and docs/batch.md follow from that:

    python -m crysforge.datapipe.schema > docs/batch.md

On a plain graph every atom is its own node (N = A, `node_of_atom` is the identity) and all
multiplicities are one. On a quotient graph one node stands for all atoms of a crystal that an
encoder of the declared depth cannot tell apart, and one edge for all equal edges that enter one
atom of the target's class. An encoder that weights its sums with the multiplicities gives the
same output on both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from crysforge.datapipe.common.batch_keys import (
    Key,
    chained,
    host,
    join,
    tensor,
    tensors,
    unless_unknown,
)
from crysforge.datapipe.crystals.crystal import MAX_Z

__all__ = ["MASKED", "MAX_Z", "CrystalBatch", "GraphSpec", "concat"]

MASKED = 0
"""Atomic number that stands for a masked (unknown) element."""


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """The graph an encoder needs. Loaders build it; nobody else needs to know.

    The neighbour rule is one of two. With `neighbors=k`, i and j are joined when either is among
    the k nearest of the other, ties at the k-th distance kept unless `cut_ties` (the ComFormer and
    Matformer recipe; its start radius has no influence on the result). With `radius=r`, all pairs
    within r Å are joined. Every pair appears in both directions. Pairs closer than 0.15 Å are
    ignored. As in that recipe, an atom's edge to its own image is there twice under the k-nearest
    rule, unless `own_images_once`: then the atoms of a supercell have the edges of the cell's.
    """

    neighbors: int | None = None
    """k of the k-nearest rule."""
    radius: float | None = None
    """Radius in Å of the radius rule."""
    lattice_edges: Literal["none", "matformer", "comformer"] = "none"
    """Self-edges to lattice images: `matformer` joins every atom to its images along a, b, c and
    their pair sums; `comformer` along the three invariant lattice vectors."""
    pdd: int = 0
    """Columns of the pointwise distance distribution (k nearest distances), 0 for none."""
    vectors: bool = False
    """Whether edges carry displacement vectors (then the graph cannot be a quotient)."""
    lattice_triple: bool = False
    """Whether crystals carry ComFormer's three invariant lattice vectors."""
    pair_sums: Literal["none", "scaled", "exact"] = "none"
    """Adds an edge for every ordered pair of atoms, an atom with itself too, that stands for all
    images at once and carries PotNet's lattice sum. Repulsion decays with a length that follows
    the cell's size (`scaled`, as in the released code) or as the paper writes it (`exact`)."""
    depth: int | None = None
    """Number of message-passing rounds. An encoder that sees only types, PDD rows and distances
    sets it, and then runs on quotient graphs too; None keeps the full graph."""
    tie_tolerance: float = 1e-4
    """Distances in Å closer than this are equal."""
    own_images_once: bool = False
    """Whether an edge to an atom's own image counts as any other under the k-nearest rule."""
    cut_ties: bool = False
    """Whether rounding cuts ties at the k-th distance, as in the released codes. The graph is then
    no function of the crystal alone: atoms that symmetry makes equal differ, and no quotient is
    made of it."""

    def __post_init__(self) -> None:
        if (self.neighbors is None) == (self.radius is None):
            raise ValueError("GraphSpec needs exactly one of neighbors=k and radius=r")
        for name, least in (("neighbors", 1), ("radius", 1e-3), ("pdd", 0), ("depth", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"GraphSpec.{name} must be at least {least}, got {value}")
        if self.tie_tolerance <= 0:
            raise ValueError(f"GraphSpec.tie_tolerance must be above 0, got {self.tie_tolerance}")
        if self.lattice_edges not in ("none", "matformer", "comformer"):
            raise ValueError(
                "GraphSpec.lattice_edges is none, matformer or comformer, "
                f"not {self.lattice_edges!r}"
            )
        if self.pair_sums not in ("none", "scaled", "exact"):
            raise ValueError(
                f"GraphSpec.pair_sums is none, scaled or exact, not {self.pair_sums!r}"
            )
        if self.cut_ties and self.neighbors is None:
            raise ValueError("GraphSpec.cut_ties is for neighbors=k: a radius has no ties")
        if self.vectors and self.depth is not None:
            raise ValueError("a graph with vectors has no quotient: leave depth=None")
        if self.vectors and self.pair_sums != "none":
            raise ValueError("an edge for all images has no vector: leave pair_sums or vectors")


@dataclass(kw_only=True)
class CrystalBatch:
    """Crystals packed one after another; never padded. docs/batch.md shows its keys as a table."""

    numbers: Tensor = tensor("A", "int64", "true atomic number of each atom")
    masked: Tensor = tensor("A", "bool", "atoms whose element the encoder must not see")
    frac_coords: Tensor = tensor(
        "A, 3", "float32", "fractional coordinates in [0, 1) (clean targets)"
    )
    lattice: Tensor = tensor(
        "B, 3, 3", "float32", "rows a, b, c in Å, standard orientation (clean targets)"
    )
    seen_frac_coords: Tensor = tensor(
        "A, 3",
        "float32",
        "coordinates of the structure whose graph this is: the clean ones unless a transform moved "
        "atoms",
    )
    seen_lattice: Tensor = tensor("B, 3, 3", "float32", "its lattice")
    batch: Tensor = tensor("A", "int64", "crystal of each atom", numbers="B")
    ptr: Tensor = tensor("B + 1", "int64", "first atom of each crystal, then A", pointer="A")
    rng_key: Tensor = tensor("B", "int64", "seed of all randomness for the crystal in this epoch")
    node_of_atom: Tensor = tensor("A", "int64", "node that stands for each atom", numbers="N")
    node_numbers: Tensor = tensor("N", "int64", "atomic number of each node, 0 where masked")
    node_multiplicity: Tensor = tensor("N", "float32", "atoms a node stands for")
    node_batch: Tensor = tensor("N", "int64", "crystal of each node", numbers="B")
    node_ptr: Tensor = tensor("B + 1", "int64", "first node of each crystal, then N", pointer="N")
    node_rng_key: Tensor = tensor("N", "int64", "seed of a node's randomness (dropout)")
    pdd: Tensor = tensor(
        "N, 1 + k",
        "float32",
        "column 0: share of the atomic number (0 where masked); then the k nearest distances in Å, "
        "ascending. [N, 0] where the spec has none",
    )
    edge_index: Tensor = tensor(
        "2, E", "int64", "row 0 source node, row 1 target node, sorted by target", numbers="N"
    )
    edge_ptr: Tensor = tensor("N + 1", "int64", "first edge into each node, then E", pointer="E")
    edge_multiplicity: Tensor = tensor(
        "E", "float32", "equal edges into ONE atom of the target node"
    )
    edge_distance_row: Tensor = tensor(
        "E", "int64", "row of `distances` that is the edge's length", numbers="U"
    )
    distances: Tensor = tensor(
        "U", "float32", "distinct edge lengths in Å; infinite in rows of `pair_sums`"
    )
    edge_vector: Tensor | None = tensor(
        "E, 3", "float32", "target minus source in Å; None unless asked for", optional=True
    )
    pair_sums: Tensor | None = tensor(
        "U",
        "float32",
        "distinct lattice sums of pairs of atoms, 0 in rows of lengths; None unless asked for",
        optional=True,
    )
    lattice_triple: Tensor | None = tensor(
        "B, 3, 3",
        "float32",
        "rows are ComFormer's invariant lattice vectors in Å; None unless asked for",
        optional=True,
    )
    targets: dict[str, Tensor] = tensors(
        "name → B", "float32", "labels in physical units, NaN where missing"
    )
    extras: dict[str, Tensor] = tensors(
        "name → rows, …",
        "any",
        "what a stage's transform says of the crystals: the rows of all, one after another",
    )
    ids: list[str] = host(list, chained, "text", "crystal ids")
    atoms_per_crystal: list[int] = host(
        list, chained, "integers", "on the host; empty if nobody counted"
    )
    most_edges: int = host(
        0,
        unless_unknown(max),
        "integer",
        "most edges into a node or out of one, on the host; 0 if nobody counted",
    )
    edge_pairs: int = host(
        0,
        unless_unknown(sum),
        "integer",
        "pairs of edges i → j, j → k, on the host; 0 if nobody counted",
    )
    is_dummy: bool = host(
        False, all, "flag", "the crystals only keep this rank in step: they count for nothing"
    )

    @classmethod
    def keys(cls) -> dict[str, Key]:
        """What each key holds, by name."""
        return {f.name: f.metadata["key"] for f in dataclasses.fields(cls)}

    @property
    def num_crystals(self) -> int:
        return self.lattice.shape[0]

    @property
    def num_atoms(self) -> int:
        return self.numbers.shape[0]

    @property
    def num_nodes(self) -> int:
        return self.node_numbers.shape[0]

    @property
    def num_edges(self) -> int:
        return self.edge_index.shape[1]

    @property
    def edge_distance(self) -> Tensor:
        """Length of every edge in Å, [E]."""
        return self.distances[self.edge_distance_row]

    def counts(self) -> dict[str, int]:
        """What the letters in shapes stand for."""
        out = {"A": self.num_atoms, "N": self.num_nodes, "E": self.num_edges}
        return {**out, "B": self.num_crystals, "U": len(self.distances)}

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> CrystalBatch:
        """The batch with `f` of every tensor."""

        def g(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: f(v) for k, v in value.items()}
            return f(value) if isinstance(value, Tensor) else value

        return CrystalBatch(**{name: g(getattr(self, name)) for name in self.keys()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CrystalBatch:
        """The same batch on another device."""
        return self.map_tensors(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CrystalBatch:
        """The same batch in page-locked memory, so that copies to a GPU overlap with work."""
        return self.map_tensors(lambda t: t.pin_memory())

    def to_pyg(self) -> Any:
        """The full set of keys as a PyG `Batch` (edge_index keeps source → target)."""
        from torch_geometric.data import Batch

        out = Batch()
        for name in self.keys():
            value = getattr(self, name)
            if isinstance(value, dict):
                for key, column in value.items():
                    out[f"{name.removesuffix('s')}_{key}"] = column
            elif value is not None:
                out[name] = value
        out.num_nodes = self.num_nodes
        return out


def concat(parts: Sequence[CrystalBatch]) -> CrystalBatch:
    """One batch of the crystals of all parts, in order. Raises ValueError on an empty sequence."""
    if not parts:
        raise ValueError("concat needs at least one batch")
    if len(parts) == 1:
        return parts[0]
    counts = [part.counts() for part in parts]
    return CrystalBatch(
        **{
            name: join(key, [getattr(part, name) for part in parts], counts)
            for name, key in CrystalBatch.keys().items()
        }
    )


def table() -> str:
    """The keys of a batch as a page of documentation."""
    rows = ["# The keys of a batch", "", "Made by `python -m crysforge.datapipe.schema`.", ""]
    rows += ["Letters: A atoms, N nodes, E edges, B crystals, U distinct distances.", ""]
    rows += ["| key | shape | dtype | meaning |", "|---|---|---|---|"]
    for name, key in CrystalBatch.keys().items():
        rows.append(f"| `{name}` | {f'[{key.shape}]'} | {key.dtype} | {key.meaning} |")
    return "\n".join(rows).replace("| [] |", "| |") + "\n"


if __name__ == "__main__":
    print(table(), end="")
