"""Pairs of atoms, how many edges join them, and the features of elements."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.elements import properties
from crysforge.datapipe.graphs.edge_transforms import CountPairEdges
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.schema import GraphSpec
from crysforge.models.objectives.element_features import (
    CLASSES,
    ORDER,
    SIZES,
    element_features,
)
from crysforge.models.objectives.pairs import PairClassifier, pair_products
from crysforge.models.ops.pairs import Pairs


def test_pairs_and_their_products():
    sizes = [2, 1, 3, 2]
    ptr = torch.tensor([0, *np.cumsum(sizes)])
    pairs = Pairs.of(ptr)
    expected = [
        (i, j)
        for start, n in zip(ptr.tolist(), sizes, strict=False)
        for i, j in itertools.product(range(start, start + n), repeat=2)
    ]
    assert torch.stack([pairs.first, pairs.second], dim=1).tolist() == [list(p) for p in expected]
    assert Pairs.starts(ptr).tolist() == [0, *np.cumsum(np.square(sizes))]
    left, right = torch.randn(8, 4, 5), torch.randn(8, 5)
    plain = torch.einsum("pcd,pd->pc", left[pairs.first], right[pairs.second])
    torch.testing.assert_close(pair_products(left, right, ptr), plain)


def test_pair_classifier_is_a_bilinear_layer_and_a_linear_one():
    torch.manual_seed(0)
    head, x, ptr = PairClassifier(5, 3), torch.randn(6, 5), torch.tensor([0, 2, 6])
    bilinear, linear = nn.Bilinear(5, 5, 3), nn.Linear(3, 3)
    with torch.no_grad():
        for own, other in zip(
            head.parameters(), [*bilinear.parameters(), *linear.parameters()], strict=True
        ):
            other.copy_(own)
    pairs = Pairs.of(ptr)
    plain = linear(bilinear(x[pairs.first], x[pairs.second])).log_softmax(1)
    torch.testing.assert_close(head(x, ptr), plain)


@pytest.mark.parametrize("quotient", [True, False])
def test_pairs_are_labelled_with_the_edges_of_the_full_graph(random_crystal, quotient):
    cube = Crystal.create("cube", [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], 4 * np.eye(3))
    four = Crystal.create("four", [6] * 4, [[0, 0, x] for x in (0, 0.25, 0.5, 0.75)], 4 * np.eye(3))
    spec = GraphSpec(neighbors=8, pdd=16, depth=2)
    crystals = [random_crystal(np.random.default_rng(n), n) for n in (1, 3, 5)]
    samples, count = [cube, four, *crystals], CountPairEdges()
    batch = build(samples, spec, quotient=quotient, transform=count)
    assert (batch.num_nodes < batch.num_atoms) == quotient
    full = build(samples, spec, quotient=False, transform=count)
    joining = torch.zeros(full.num_atoms, full.num_atoms)
    source, target = full.edge_index
    joining.index_put_((target, source), torch.ones(full.num_edges), accumulate=True)
    pairs = Pairs.of(batch.ptr)
    assert torch.equal(batch.extras["pair_edges"].float(), joining[pairs.first, pairs.second])


def test_element_features():
    table = element_features()
    assert table.shape == (119, 92)
    assert set(table.unique().tolist()) == {0, 1}
    assert not table[0].any()
    starts = dict(zip(ORDER, np.cumsum([0, *(SIZES[n] for n in ORDER)]).tolist(), strict=False))
    for number in (1, 2, 8, 11, 26, 57, 64, 70, 92):
        known = properties(number)
        row = table[number]
        for name in ORDER:
            bits = row[starts[name] : starts[name] + SIZES[name]]
            assert bits.sum() == (known[name] is not None)
            if name in CLASSES and known[name] in CLASSES[name]:
                assert CLASSES[name][int(bits.argmax())] == known[name]
    assert [properties(z)["valence_electrons"] for z in (20, 26, 30, 31, 70, 82)] == [
        2,
        8,
        12,
        3,
        2,
        4,
    ]
    assert len({tuple(row.tolist()) for row in table[1:95]}) > 85  # it tells elements apart
