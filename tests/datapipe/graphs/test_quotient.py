"""The quotient graph: the plain colour refinement, the same outputs and gradients, supercells."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build, neighbours
from crysforge.datapipe.graphs.quotient import classes, refine
from crysforge.datapipe.graphs.transforms import MaskAtoms, Sample
from crysforge.datapipe.schema import CrystalBatch, GraphSpec


def supercell(crystal: Crystal, shape: tuple[int, int, int]) -> Crystal:
    """The same crystal with a cell of several; copies of an atom stand together."""
    shifts = np.array(list(itertools.product(*map(range, shape))))
    frac = (crystal.frac_coords[:, None] + shifts).reshape(-1, 3) / shape
    numbers = np.repeat(crystal.numbers, len(shifts))
    return Crystal.create(crystal.id, numbers, frac, crystal.lattice * np.array(shape)[:, None])


def random_crystal(seed: int, n: int) -> Crystal:
    rng = np.random.default_rng(seed)
    lattice = 4 * np.eye(3) + rng.uniform(-1, 1, size=(3, 3))
    return Crystal.create(str(seed), rng.integers(1, 4, n), rng.uniform(size=(n, 3)), lattice)


PEROVSKITE = Crystal.create(
    "SrTiO3",
    [38, 22, 8, 8, 8],
    [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
    3.9 * np.eye(3),
)
DIAMOND = Crystal.create(
    "C", [6, 6], [[0, 0, 0], [0.25, 0.25, 0.25]], 1.785 * (np.ones((3, 3)) - np.eye(3))
)
CHAIN = supercell(Crystal.create("Po", [84], np.zeros((1, 3)), 3 * np.eye(3)), (9, 1, 1))
CHAIN.numbers[0] = 83
"""A row of nine atoms with one foreign: every round tells one more shell from the rest."""
MOLECULE_LIKE = Crystal.create(
    "far", [1, 1, 2, 2], [[0, 0, 0], [0.1, 0, 0], [0.5, 0.5, 0.5], [0.6, 0.5, 0.5]], 12 * np.eye(3)
)
CRYSTALS = [
    PEROVSKITE,
    DIAMOND,
    CHAIN,
    MOLECULE_LIKE,
    supercell(PEROVSKITE, (2, 1, 2)),
    random_crystal(0, 6),
    supercell(random_crystal(1, 3), (1, 2, 1)),
    Crystal.create("line", [2, 2, 2], np.diag([0, 0.3, 0.8]) @ np.ones((3, 3)), 12 * np.eye(3)),
    Crystal.create("one", [3], np.zeros((1, 3)), 3.5 * np.eye(3)),
]
SPECS = {
    "pdd": GraphSpec(neighbors=25, pdd=30, depth=4),
    "lattice edges": GraphSpec(neighbors=12, lattice_edges="matformer", depth=5),
    "rows alone": GraphSpec(radius=1.9, pdd=8, depth=2),
    "radius": GraphSpec(radius=4.0, depth=3),
    "one round": GraphSpec(radius=3.2, depth=1),
    "two rounds": GraphSpec(neighbors=6, depth=2),
    "once": GraphSpec(neighbors=12, own_images_once=True, depth=3),
}


def samples(masked: bool) -> list[Sample]:
    clean = [Sample.clean(c, i) for i, c in enumerate(CRYSTALS)]
    if not masked:
        return clean
    return [MaskAtoms(0.3).on_crystal(s, np.random.default_rng(s.rng_key)) for s in clean]


class TinyNet(nn.Module):
    """Message passing with weighted sums, batch statistics over edges and nodes, and mean
    readout, in plain float64 torch."""

    def __init__(self, spec: GraphSpec, width: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depth = spec.depth or 0
        self.element = nn.Embedding(100, width)
        self.row = nn.Linear(1 + spec.pdd, width) if spec.pdd else None
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"message": nn.Linear(2 * width + 3, 2 * width), "combine": nn.Linear(width, width)}
            )
            for _ in range(self.depth)
        )
        self.double()

    @staticmethod
    def normalise(x, weight):
        mean = (weight * x).sum(0) / weight.sum()
        variance = (weight * (x - mean) ** 2).sum(0) / weight.sum()
        return (x - mean) / (variance + 1e-5).sqrt()

    def forward(self, batch: CrystalBatch) -> tuple[torch.Tensor, torch.Tensor]:
        source, target = batch.edge_index
        d = batch.edge_distance.double()[:, None]
        radial = torch.cat([1 / d, torch.sin(d), torch.exp(-d)], dim=1)
        count, atoms = (
            batch.edge_multiplicity.double()[:, None],
            batch.node_multiplicity.double()[:, None],
        )
        h = self.element(batch.node_numbers)
        if self.row is not None:
            h = h + self.row(batch.pdd.double())
        for layer in self.layers:
            gate, value = layer["message"](torch.cat([h[source], h[target], radial], 1)).chunk(2, 1)
            message = torch.sigmoid(self.normalise(gate, count * atoms[target])) * value
            heard = torch.zeros_like(h).index_add(0, target, count * message)
            h = torch.tanh(h + self.normalise(layer["combine"](heard), atoms))
        total = h.new_zeros(batch.num_crystals, h.shape[1]).index_add(
            0, batch.node_batch, atoms * h
        )
        size = batch.batch.bincount(minlength=batch.num_crystals)[:, None]
        return h[batch.node_of_atom], total / size


def run(spec: GraphSpec, batch: CrystalBatch):
    net = TinyNet(spec)
    atoms, crystals = net(batch)
    weights = torch.randn(atoms.shape, generator=torch.Generator().manual_seed(1)).double()
    ((atoms * weights).sum() + (crystals**2).sum()).backward()
    return atoms, crystals, {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_outputs_and_gradients_are_those_of_the_full_graph(name, masked):
    spec, items = SPECS[name], samples(masked)
    full, quotient = build(items, spec, quotient=False), build(items, spec)
    assert quotient.num_nodes < full.num_nodes and quotient.num_edges < full.num_edges
    atoms, crystals, gradients = run(spec, full)
    atoms_q, crystals_q, gradients_q = run(spec, quotient)
    torch.testing.assert_close(atoms_q, atoms, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(crystals_q, crystals, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == gradients_q.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradients_q[parameter], gradient, rtol=1e-8, atol=1e-8)


def plain_refinement(batch: CrystalBatch, depth: int) -> list[tuple]:
    """Colours as nested tuples, from a plain graph: the definition."""
    source, target = batch.edge_index.tolist()
    colour: list = [
        (crystal, number, tuple(row))
        for crystal, number, row in zip(
            batch.batch.tolist(), batch.node_numbers.tolist(), batch.pdd.tolist(), strict=True
        )
    ]
    for _ in range(depth):
        heard: list[Counter] = [Counter() for _ in colour]
        for s, t, shell in zip(source, target, batch.edge_distance_row.tolist(), strict=True):
            heard[t][colour[s], shell] += 1
        number = {}
        for c, bag in zip(colour, heard, strict=True):
            number.setdefault((c, frozenset(bag.items())), len(number))
        colour = [number[c, frozenset(b.items())] for c, b in zip(colour, heard, strict=True)]
    return colour


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_nodes_and_edges_are_those_of_the_definition(name, masked):
    spec, items = SPECS[name], samples(masked)
    full, quotient = build(items, spec, quotient=False), build(items, spec)
    colour = plain_refinement(full, spec.depth)
    first = {c: i for i, c in reversed(list(enumerate(colour)))}
    order = sorted(first.values())
    node = {colour[i]: k for k, i in enumerate(order)}
    assert quotient.node_of_atom.tolist() == [node[c] for c in colour]
    # The edges of a class are those into its first atom, by class of the source and length.
    expected: Counter = Counter()
    source, target = full.edge_index.tolist()
    for s, t, shell in zip(source, target, full.edge_distance_row.tolist(), strict=True):
        if t in order:
            expected[node[colour[t]], node[colour[s]], shell] += 1
    found = zip(
        quotient.edge_index[1].tolist(),
        quotient.edge_index[0].tolist(),
        quotient.edge_distance_row.tolist(),
        strict=True,
    )
    assert list(found) == sorted(expected)
    assert quotient.edge_multiplicity.tolist() == [expected[e] for e in sorted(expected)]
    for field in ("numbers", "masked", "frac_coords", "batch", "rng_key", "distances"):
        assert torch.equal(getattr(quotient, field), getattr(full, field)), field
    for field in ("node_numbers", "pdd", "node_batch"):
        assert torch.equal(getattr(quotient, field), getattr(full, field)[order]), field


def test_depth_bounds_what_is_told_apart():
    """In a row of nine with one foreign atom, each round separates one more pair of neighbours."""
    nodes = [build([CHAIN], GraphSpec(radius=3.1, depth=d)).num_nodes for d in range(8)]
    assert nodes == [2, 3, 4, 5, 5, 5, 5, 5]
    assert build([CHAIN], GraphSpec(radius=3.1)).num_nodes == 9


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 3, 2), (2, 2, 2)])
@pytest.mark.parametrize("crystal", [PEROVSKITE, DIAMOND, random_crystal(3, 5)], ids=lambda c: c.id)
@pytest.mark.parametrize(
    "rule", [{"radius": 4.0}, {"neighbors": 2}, {"neighbors": 12, "own_images_once": True}]
)
def test_supercell_has_the_same_quotient(crystal, shape, rule):
    """The k-nearest recipe counts images of an atom in its own list twice. So there it holds where
    these are counted once, or as long as no atom neighbours its own image: k = 2 here."""
    spec = GraphSpec(**rule, pdd=20, depth=4)
    one, many = build([crystal], spec), build([supercell(crystal, shape)], spec)
    times = int(np.prod(shape))
    assert torch.equal(many.node_multiplicity, one.node_multiplicity * times)
    for field in ("node_numbers", "edge_index", "edge_multiplicity", "edge_distance_row"):
        assert torch.equal(getattr(many, field), getattr(one, field)), field
    torch.testing.assert_close(many.distances, one.distances, rtol=0, atol=1e-5)
    torch.testing.assert_close(many.pdd[:, 1:], one.pdd[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(many.pdd[:, 0], one.pdd[:, 0] / times)


def test_masks_are_a_colour():
    spec = GraphSpec(neighbors=12, pdd=12, depth=3)
    oxygens = np.array([False, False, True, True, True])
    assert build([PEROVSKITE], spec).num_nodes == 3
    assert build([Sample(PEROVSKITE, 0, oxygens, PEROVSKITE)], spec).num_nodes == 3
    one = np.array([False, False, True, False, False])
    assert build([Sample(PEROVSKITE, 0, one, PEROVSKITE)], spec).num_nodes == 4
    # A masked atom and a visible one with equal surroundings are different.
    half = Sample(DIAMOND, 0, np.array([True, False]), DIAMOND)
    assert build([half], spec).num_nodes == 2


def test_a_spec_without_depth_keeps_every_atom():
    batch = build([PEROVSKITE, DIAMOND], GraphSpec(neighbors=12), quotient=True)
    assert torch.equal(batch.node_of_atom, torch.arange(7))
    assert (batch.node_multiplicity == 1).all() and (batch.edge_multiplicity == 1).all()


def test_refinement_sees_counts_and_empty_neighbourhoods():
    """Three atoms of one colour: no edge, one edge, the same edge twice."""
    edge_ptr = np.array([0, 0, 1, 2])
    colour = np.zeros(3, dtype=np.uint64)
    args = (np.array([0, 0]), np.array([7, 7]), np.array([1, 2]), edge_ptr)
    assert len(set(refine(colour, *args, depth=1))) == 3
    assert len(set(refine(colour, *args, depth=0))) == 1
    first, of_atom = classes(np.array([9, 4, 9, 1, 4], dtype=np.uint64))
    assert first.tolist() == [0, 1, 3] and of_atom.tolist() == [0, 1, 0, 2, 1]


def test_geometry_does_not_depend_on_elements():
    """Cached geometry is reused under every mask, so it may not know an element."""
    spec = SPECS["pdd"]
    other = Crystal.create("x", [1, 2, 3, 4, 5], PEROVSKITE.frac_coords, PEROVSKITE.lattice)
    a, b = neighbours(PEROVSKITE, spec), neighbours(other, spec)
    for field in ("edges", "distances", "pdd", "pdd_row"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
