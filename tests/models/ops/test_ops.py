"""Segment operations and fused messages equal their definitions, edge by edge."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch_geometric.nn import global_mean_pool
from torch_geometric.utils import scatter, softmax

import crysforge.models.ops.messages as messages
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.graphs.packing import build
from crysforge.datapipe.schema import GraphSpec
from crysforge.models.layers.basic import RBF, OneHotLinear, compose
from crysforge.models.ops import dispatch
from crysforge.models.ops.dispatch import Op
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.norm import BatchNorm
from crysforge.models.ops.segments import (
    gather_source,
    gather_sum,
    gather_target,
    mean_readout,
    segment_softmax,
    segment_sum,
)

F64 = torch.float64


def random_edges(nodes=6, edges=17, rows=5, seed=0) -> Edges:
    """Edges with multiplicities 1..3; some nodes have none."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, max(nodes, 1), (edges,), generator=g).sort().values
    count = torch.randint(1, 4, (edges,), generator=g)
    atoms = torch.randint(1, 4, (nodes,), generator=g)
    return Edges(
        source=torch.randint(0, max(nodes, 1), (edges,), generator=g),
        target=target,
        row=torch.randint(0, rows, (edges,), generator=g),
        ptr=torch.bincount(target + 1, minlength=nodes + 1).cumsum(0),
        count=count.float(),
        weight=(count * atoms[target]).float(),
        rows=rows,
    )


def random(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=g, requires_grad=True)


@pytest.fixture(params=[(6, 17), (6, 0), (0, 0), (1, 1), (40, 300)], ids=str)
def edges(request):
    nodes, count = request.param
    return random_edges(nodes, count)


def test_gathers_and_sums_are_those_of_indexing(edges):
    n, e, r = edges.num_nodes, len(edges), edges.rows
    table, x, m = random(2 * n + r, 3), random(n, 3, seed=1), random(e, 3, seed=2)
    a, b, c = table.split([n, n, r])
    pairs = [
        (gather_sum(table, edges), a[edges.target] + b[edges.source] + c[edges.row], table),
        (gather_source(x, edges), x[edges.source], x),
        (gather_target(x, edges), x[edges.target], x),
        (
            segment_sum(m, edges),
            scatter(m * edges.count[:, None], edges.target, dim_size=n),
            m,
        ),
    ]
    for fast, plain, argument in pairs:
        torch.testing.assert_close(fast, plain)
        upstream = torch.randn_like(plain)
        grads = [torch.autograd.grad(y, argument, upstream)[0] for y in (fast, plain)]
        torch.testing.assert_close(*grads)


def test_softmax_is_that_of_repeated_edges(edges):
    scores = random(len(edges), 3)
    repeats = edges.count.long()
    ours = segment_softmax(scores, edges)
    target = edges.target.repeat_interleave(repeats)
    theirs = softmax(scores.repeat_interleave(repeats, 0), target, num_nodes=edges.num_nodes)
    torch.testing.assert_close(ours.repeat_interleave(repeats, 0), theirs)
    upstream = torch.randn_like(theirs)
    summed = scatter(
        upstream,
        torch.arange(len(edges)).repeat_interleave(repeats),
        dim_size=len(edges),
    )
    grads = [torch.autograd.grad(y, scores, g)[0] for y, g in ((ours, summed), (theirs, upstream))]
    torch.testing.assert_close(*grads)


def test_softmax_of_huge_scores_is_finite():
    edges = random_edges()
    assert torch.isfinite(segment_softmax(torch.full((17, 1), 1e4), edges)).all()


def test_readout_is_the_mean_over_atoms():
    cell = 4 * torch.eye(3).numpy()
    crystals = [
        Crystal.create("rocksalt", [11] * 4 + [17] * 4, _ROCKSALT, cell),
        Crystal.create("alone", [29], [[0, 0, 0]], cell),
    ]
    batch = build(crystals, GraphSpec(neighbors=6, depth=2))
    assert batch.num_nodes < batch.num_atoms
    x = random(batch.num_nodes, 3)
    mean = mean_readout(x, batch)
    plain = global_mean_pool(x[batch.node_of_atom], batch.batch)
    torch.testing.assert_close(mean, plain)
    upstream = torch.randn_like(plain)
    grads = [torch.autograd.grad(y, x, upstream)[0] for y in (mean, plain)]
    torch.testing.assert_close(*grads)


_ROCKSALT = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
_ROCKSALT += [[x + 0.5, y, z] for x, y, z in _ROCKSALT]


def comformer(edges: Edges, training: bool, dim=4):
    """Leaves and the fused and the plain function of them."""
    n, r = edges.num_nodes, edges.rows
    torch.manual_seed(0)
    key_out, value_out = nn.Linear(dim, dim).double(), nn.Linear(dim, dim).double()
    leaves = [random(n, dim), random(2 * n + r, dim, seed=1), random(2 * n + r, dim, seed=2)]
    norms = BatchNorm(dim).double().train(training), BatchNorm(dim).double().train(training)
    with torch.no_grad():
        norms[0].weight.normal_()
        norms[1].load_state_dict(norms[0].state_dict())

    def fused(query, keys, values):
        return messages.comformer_messages(query, keys, values, key_out, value_out, norms[0], edges)

    def plain(query, keys, values):
        key = key_out(torch.nn.functional.silu(gather_sum(keys, edges)))
        value = value_out(torch.nn.functional.silu(gather_sum(values, edges)))
        score = norms[1](query[edges.target] * key, edges.weight)
        return segment_sum(value * torch.sigmoid(score), edges)

    modules = [key_out, value_out]
    return leaves, fused, plain, modules, norms


def matformer(edges: Edges, heads=2, dim=3):
    n, r = edges.num_nodes, edges.rows
    torch.manual_seed(0)
    gate_norm, message, message_norm = (
        nn.LayerNorm(3 * dim).double(),
        nn.Linear(3 * dim, dim).double(),
        nn.LayerNorm(dim).double(),
    )
    modules = [gate_norm, message, message_norm]
    for norm in (gate_norm, message_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    leaves = [
        random(n, heads, dim),
        random(n, heads, dim, seed=1),
        random(r, heads, dim, seed=2),
        random(2 * n + r, heads * 3 * dim, seed=3),
    ]

    def fused(query, key, feature, values):
        return messages.matformer_messages(query, key, feature, values, *modules, edges)

    def plain(query, key, feature, values):
        i, j = edges.target, edges.source
        score = torch.cat([key[i], key[j], feature[edges.row]], -1) * query[i].repeat(1, 1, 3)
        value = gather_sum(values, edges).view_as(score)
        out = message_norm(message(value * torch.sigmoid(gate_norm(score))))
        return segment_sum(out.flatten(1), edges).view_as(query)

    return leaves, fused, plain, modules


@pytest.mark.parametrize("block", [1, 40, 1 << 19])
@pytest.mark.parametrize("kind", ["comformer-train", "comformer-eval", "matformer"])
def test_fused_messages_equal_the_plain_ones(kind, block, edges, monkeypatch):
    monkeypatch.setattr(messages, "_BLOCK", block)
    training = kind == "comformer-train"
    if training and len(edges) == 1:
        pytest.skip("one edge has no batch statistics")
    norms = ()
    if kind == "matformer":
        leaves, fused, plain, modules = matformer(edges)
    else:
        leaves, fused, plain, modules, norms = comformer(edges, training)
    parameters = [p for m in modules for p in m.parameters()]
    results = []
    for i, function in enumerate((fused, plain)):
        arguments = [*leaves, *parameters, *(norms[i].parameters() if norms else [])]
        out = function(*leaves)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append([out, *torch.autograd.grad(out, arguments, upstream)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    if norms:
        for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["comformer-train", "comformer-eval", "matformer"])
def test_fused_messages_have_the_gradient_of_finite_differences(kind, monkeypatch):
    monkeypatch.setattr(messages, "_BLOCK", 20)
    edges = random_edges(4, 9, 3)
    case = matformer(edges) if kind == "matformer" else comformer(edges, kind.endswith("train"))
    leaves, fused = case[:2]
    assert gradcheck(fused, leaves)


def test_a_second_backward_and_a_rerun_are_bit_equal():
    leaves, fused, *_ = comformer(random_edges(40, 300), training=True)
    out = fused(*leaves)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves)
    again = fused(*leaves)
    assert torch.equal(out, again)
    for a, b, c in zip(first, second, torch.autograd.grad(again.sum(), leaves), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_twin_is_taken_where_kernels_are_wanted():
    @Op
    def double(x):
        """Twice x."""
        return 2 * x

    assert double(torch.ones(1)) == 2
    assert double.__doc__ == "Twice x."
    with dispatch.forced("triton"):
        assert double(torch.ones(1)) == 2  # it has none
        double.has_twin(lambda x: "twin")
        assert double(torch.ones(1)) == "twin"
    assert double.plain(torch.ones(1)) == 2


@pytest.mark.parametrize("n", [1, 400])
def test_compose_is_both_linears_whichever_way_is_cheaper(n):
    torch.manual_seed(0)
    inner, outer = nn.Linear(5, 7).double(), random(9, 7)
    bias = random(9, seed=1)
    x = random(n, 5, seed=2)
    torch.testing.assert_close(compose(x, outer, inner, bias), inner(x) @ outer.t() + bias)


def test_radial_basis_spacing_and_width():
    rbf = RBF(-4.0, 0.0, 256)
    values = rbf(torch.tensor([-4.0, -4.0 + 4 / 255]))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[1, :2], torch.tensor([0.984436, 1.0]), atol=1e-5, rtol=0)
    assert values[0].argmax() == 0 and values[1].argmax() == 1
    # exp(-Δ²/Δ) at the next centre, Δ = 4/255
    torch.testing.assert_close(values[0, 1], torch.tensor(-4 / 255).exp())


def test_one_hot_linear_is_a_linear_of_one_hot_vectors():
    layer = OneHotLinear(119, 8)
    index = torch.tensor([0, 1, 118, 1])
    plain = nn.functional.linear(
        nn.functional.one_hot(index, 119).float(), layer.weight, layer.bias
    )
    torch.testing.assert_close(layer(index), plain)
    with pytest.raises(ValueError, match="atomic number 92"):
        OneHotLinear(92, 8)(torch.tensor([3, 92]))
