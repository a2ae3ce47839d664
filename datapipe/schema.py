"""The one contract between data and models: what a graph is (`GraphSpec`) and what a packed
batch holds (`CrystalBatch`).

Letters in shapes: A atoms, N nodes, E edges, B crystals, U distinct distances.

On a plain graph every atom is its own node (N = A, `node_of_atom` is the identity) and all
multiplicities are one. On a quotient graph one node stands for all atoms of a crystal that an
encoder of the declared depth cannot tell apart, and one edge for all equal edges that enter one
atom of the target's class. An encoder that weights its sums with the multiplicities gives the
same output on both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MASKED = 0
"""Atomic number that stands for a masked (unknown) element."""

MAX_Z = 118
"""Largest atomic number."""


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """The graph an encoder needs. Loaders build it; nobody else needs to know.

    The neighbour rule is one of two. With `neighbors=k`, i and j are joined when either is among
    the k nearest of the other, ties at the k-th distance kept (the ComFormer/Matformer recipe; its
    start radius has no influence on the result). With `radius=r`, all pairs within r Å are joined.
    Every pair appears in both directions. Pairs closer than 0.15 Å are ignored. As in that recipe,
    an atom's edge to its own image is there twice under the k-nearest rule, unless
    `own_images_once`: then the atoms of a supercell have the edges of the cell's.
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
        if self.vectors and self.depth is not None:
            raise ValueError("a graph with vectors has no quotient: leave depth=None")
        if self.vectors and self.pair_sums != "none":
            raise ValueError("an edge for all images has no vector: leave pair_sums or vectors")


@dataclass(kw_only=True)
class CrystalBatch:
    """Crystals packed one after another; never padded.

    | key | shape | dtype | meaning |
    |---|---|---|---|
    | numbers | [A] | int64 | true atomic number of each atom |
    | masked | [A] | bool | atoms whose element the encoder must not see |
    | frac_coords | [A, 3] | float32 | fractional coordinates in [0, 1) (clean targets) |
    | lattice | [B, 3, 3] | float32 | rows a, b, c in Å, standard orientation (clean targets) |
    | seen_frac_coords | [A, 3] | float32 | coordinates of the structure whose graph this is: the
      clean ones unless a transform moved atoms |
    | seen_lattice | [B, 3, 3] | float32 | its lattice |
    | batch | [A] | int64 | crystal of each atom |
    | ptr | [B+1] | int64 | first atom of each crystal, then A |
    | key | [B] | int64 | seed of all randomness for the crystal in this epoch |
    | node_of_atom | [A] | int64 | node that stands for each atom |
    | node_numbers | [N] | int64 | atomic number of each node, 0 where masked |
    | node_count | [N] | float32 | atoms a node stands for |
    | node_batch | [N] | int64 | crystal of each node |
    | node_ptr | [B+1] | int64 | first node of each crystal, then N |
    | node_key | [N] | int64 | seed of a node's randomness (dropout) |
    | pdd | [N, 1+k] | float32 | column 0: share of the atomic number (0 where masked); then the k
      nearest distances in Å, ascending. [N, 0] where the spec has none |
    | edge_index | [2, E] | int64 | row 0 source node, row 1 target node, sorted by target |
    | edge_ptr | [N+1] | int64 | first edge into each node, then E |
    | edge_count | [E] | float32 | equal edges into ONE atom of the target node |
    | edge_shell | [E] | int64 | row of `distances` that is the edge's length |
    | distances | [U] | float32 | distinct edge lengths in Å; infinite in rows of `pair_sums` |
    | pair_sums | [U] | float32 | distinct lattice sums of pairs of atoms, 0 in rows of lengths;
      None unless asked for |
    | lattice_triple | [B, 3, 3] | float32 | rows are ComFormer's invariant lattice vectors in Å;
      None unless asked for |
    | edge_vector | [E, 3] | float32 | target minus source in Å; None unless asked for |
    | targets | name → [B] | float32 | labels in physical units, NaN where missing |
    | labels | name → [rows, …] | any | what a stage's transform says of the crystals: the rows of
      all crystals, one after another |
    | ids | B strings | | crystal ids |
    | sizes | B integers | | atoms of each crystal, on the host; empty if nobody counted |
    | most_edges | integer | | most edges into a node or out of one, on the host; 0 if nobody
      counted |
    | edge_pairs | integer | | pairs of edges i → j, j → k, on the host; 0 if nobody counted |
    | filler | flag | bool | the crystals only keep this rank in step: nothing of them counts |
    """

    numbers: Tensor
    masked: Tensor
    frac_coords: Tensor
    lattice: Tensor
    seen_frac_coords: Tensor
    seen_lattice: Tensor
    batch: Tensor
    ptr: Tensor
    key: Tensor
    node_of_atom: Tensor
    node_numbers: Tensor
    node_count: Tensor
    node_batch: Tensor
    node_ptr: Tensor
    node_key: Tensor
    pdd: Tensor
    edge_index: Tensor
    edge_ptr: Tensor
    edge_count: Tensor
    edge_shell: Tensor
    distances: Tensor
    edge_vector: Tensor | None = None
    pair_sums: Tensor | None = None
    lattice_triple: Tensor | None = None
    targets: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    labels: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    ids: list[str] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)
    most_edges: int = 0
    edge_pairs: int = 0
    filler: bool = False

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
        return self.distances[self.edge_shell]

    def _map(self, f) -> CrystalBatch:
        def g(value):
            if isinstance(value, Tensor):
                return f(value)
            if isinstance(value, dict):
                return {k: f(v) for k, v in value.items()}
            return value

        return CrystalBatch(
            **{x.name: g(getattr(self, x.name)) for x in dataclasses.fields(CrystalBatch)}
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CrystalBatch:
        """The same batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CrystalBatch:
        """The same batch in page-locked memory, so that copies to a GPU overlap with work."""
        return self._map(lambda t: t.pin_memory())

    def to_pyg(self):
        """The full set of keys as a PyG `Batch` (edge_index keeps source → target)."""
        from torch_geometric.data import Batch

        out = Batch()
        for x in dataclasses.fields(CrystalBatch):
            value = getattr(self, x.name)
            if isinstance(value, dict):
                for name, column in value.items():
                    out[f"{x.name.removesuffix('s')}_{name}"] = column
            elif value is not None:
                out[x.name] = value
        out.num_nodes = self.num_nodes
        return out


_OFFSETS = {
    "batch": "num_crystals",
    "node_batch": "num_crystals",
    "node_of_atom": "num_nodes",
    "edge_index": "num_nodes",
}


def concat(parts: Sequence[CrystalBatch]) -> CrystalBatch:
    """One batch of the crystals of all parts, in order. Raises ValueError on an empty sequence."""
    if not parts:
        raise ValueError("concat needs at least one batch")
    if len(parts) == 1:
        return parts[0]
    out: dict = {}
    for x in dataclasses.fields(CrystalBatch):
        name, values = x.name, [getattr(p, x.name) for p in parts]
        if name in ("ids", "sizes"):
            out[name] = [i for each in values for i in each]
        elif name == "filler":
            out[name] = all(values)
        elif name == "most_edges":
            out[name] = max(values) if all(values) else 0
        elif name == "edge_pairs":
            out[name] = sum(values) if all(values) else 0
        elif name in ("targets", "labels"):
            out[name] = {k: torch.cat([v[k] for v in values]) for k in values[0]}
        elif values[0] is None:
            out[name] = None
        elif name in ("ptr", "node_ptr", "edge_ptr"):
            shifted, end = [], 0
            for v in values:
                shifted.append(v[:-1] + end)
                end += int(v[-1])
            out[name] = torch.cat([*shifted, values[0].new_tensor([end])])
        elif name == "edge_shell" or name in _OFFSETS:
            sized, shift = [], 0
            for p, v in zip(parts, values, strict=True):
                sized.append(v + shift)
                shift += len(p.distances) if name == "edge_shell" else getattr(p, _OFFSETS[name])
            out[name] = torch.cat(sized, dim=-1)
        else:
            out[name] = torch.cat(values)
    return CrystalBatch(**out)
