import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from crysforge.models.denoisers.dit import SIZES, DiT, DiTConfig, index_embedding
from crysforge.models.layers.time_embedding import time_embedding
from crysforge.models.ops import attention
from crysforge.models.ops.attention import ATTENTION, Layout, attend, by_size
from crysforge.models.ops.modulation import per_crystal

SMALL = DiTConfig(width=32, layers=2, heads=4)
SHAPE = [3, 1, 5, 3, 2, 5]


def pack(sizes):
    """batch [A] and ptr [B+1] of crystals of these sizes."""
    sizes = torch.tensor(sizes)
    return torch.arange(len(sizes)).repeat_interleave(sizes), F.pad(sizes.cumsum(0), (1, 0))


def layout(sizes):
    batch, ptr = pack(sizes)
    return Layout(ptr, batch, tuple(sizes))


def awake(config=SMALL, dim=6, seed=0):
    """A DiT in fp64 none of whose parameters is zero."""
    generator = torch.Generator().manual_seed(seed)
    model = DiT(config, dim).double()
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def inputs(sizes, dim=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), dim, generator=generator, dtype=torch.float64)
    return x, torch.rand(len(sizes), generator=generator, dtype=torch.float64), *pack(sizes)


def padded_dit(model, x, t, mask):
    """The definition on padded tokens: x [B, N, dim], t [B], mask [B, N] → [B, N, dim]."""
    config = model.config

    def modulate(u, shift, scale):
        norm = F.layer_norm(u, (config.width,), eps=1e-6)
        return norm * (1 + scale[:, None]) + shift[:, None]

    h = model.input(x)
    if config.index_embed:
        h = h + index_embedding(torch.arange(x.shape[1]), config.width)
    c = model.time(time_embedding(t))
    for block in model.blocks:
        mods = block.modulation(F.silu(c)).chunk(6, dim=1)
        attention = nn.MultiheadAttention(config.width, config.heads, batch_first=True).double()
        u = modulate(h, mods[0], mods[1])
        weights = {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.project.weight,
            "out_proj.bias": block.project.bias,
        }
        seen, _ = torch.func.functional_call(
            attention, weights, (u, u, u), {"key_padding_mask": ~mask, "need_weights": False}
        )
        h = h + mods[2][:, None] * seen
        h = h + mods[5][:, None] * block.mlp(modulate(h, mods[3], mods[4]))
    shift, scale = model.final_modulation(F.silu(c)).chunk(2, dim=1)
    return model.output(modulate(h, shift, scale)) * mask[..., None]


@pytest.mark.parametrize(("size", "millions"), [("S", 32.7), ("B", 129.9)])
def test_parameter_counts_are_the_published_ones(size, millions):
    with torch.device("meta"):
        model = DiT(SIZES[size], 256)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_output_is_zero_at_initialisation_and_the_loss_still_moves_it():
    model = DiT(SMALL, 6)
    x, t, batch, ptr = inputs(SHAPE)
    out = model(x.float(), t.float(), batch, ptr)
    assert torch.equal(out, torch.zeros_like(out))
    (out - x.float()).square().sum().backward()
    assert model.output.weight.grad.abs().sum() > 0


def test_initialisation():
    model = DiT(DiTConfig(width=256, layers=1, heads=4), 64)
    block = model.blocks[0]
    for layer in (model.input, block.qkv, block.project, block.mlp[0], block.mlp[2]):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    for layer in (model.time[0], model.time[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in (block.modulation, model.final_modulation, model.output):
        assert not layer.weight.any()
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_embeddings_are_the_written_formulas():
    t = [0.01, 0.5, 0.99]
    got = time_embedding(torch.tensor(t))
    frequencies = [10000 ** (-k / 128) for k in range(128)]
    want = [
        [math.cos(s * w) for w in frequencies] + [math.sin(s * w) for w in frequencies] for s in t
    ]
    assert torch.allclose(got, torch.tensor(want), atol=1e-6)
    d = 12
    got = index_embedding(torch.tensor([0, 1, 7]), d)
    angles = [[i * math.pi / 2048 ** (2 * k / d) for k in range(d // 2)] for i in (0, 1, 7)]
    want = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles]
    assert torch.allclose(got, torch.tensor(want), atol=1e-5)


@pytest.mark.parametrize("path", ATTENTION)
@pytest.mark.parametrize("index_embed", [True, False])
def test_packed_equals_padded_forward_and_backward(path, index_embed):
    model = awake(DiTConfig(width=32, layers=2, heads=4, index_embed=index_embed, attention=path))
    x, t, batch, ptr = inputs(SHAPE)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    mask = torch.arange(max(SHAPE)) < torch.tensor(SHAPE)[:, None]

    x_packed = x.clone().requires_grad_()
    packed = model(x_packed, t, batch, ptr)
    (packed * target).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    x_padded = x.new_zeros(*mask.shape, x.shape[1])
    x_padded[mask] = x
    x_padded.requires_grad_()
    padded = padded_dit(model, x_padded, t, mask)
    (padded[mask] * target).sum().backward()

    assert torch.allclose(packed, padded[mask], rtol=1e-9, atol=1e-9)
    assert torch.allclose(x_packed.grad, x_padded.grad[mask], rtol=1e-9, atol=1e-9)
    for got, (name, p) in zip(grads, model.named_parameters(), strict=True):
        assert p.grad.abs().sum() > 0, name
        assert torch.allclose(got, p.grad, rtol=1e-9, atol=1e-9), name


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), sort=st.booleans())
def test_attention_paths_agree(sizes, sort):
    where = layout(sizes)
    if sort:
        where, _, _ = by_size(where)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(sum(sizes), 3, 2, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(sum(sizes), 2, 8, generator=generator, dtype=torch.float64)
    results = []
    for path in ("padded", "grouped", "jagged"):
        qkv = start.clone().requires_grad_()
        out = attend(qkv, where, path)
        (out * weight).sum().backward()
        results.append((out, qkv.grad))
    for out, grad in results[1:]:
        assert torch.allclose(out, results[0][0], rtol=1e-10, atol=1e-10)
        assert torch.allclose(grad, results[0][1], rtol=1e-10, atol=1e-10)


def test_by_size_brings_equal_crystals_together_and_keeps_tokens_in_order():
    new, crystals, tokens = by_size(layout(SHAPE))
    assert list(new.sizes) == sorted(SHAPE)
    batch, ptr = pack(SHAPE)
    assert torch.equal(pack(new.sizes)[0], new.batch)
    assert torch.equal(pack(new.sizes)[1], new.ptr)
    want = torch.cat([torch.arange(ptr[i], ptr[i + 1]) for i in crystals])
    assert torch.equal(tokens, want)
    assert torch.equal(batch[tokens], crystals[new.batch])


def kept_bytes(model, *arguments):
    """Bytes that the backward pass of a forward pass keeps, parameters aside; the output."""
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*arguments)
    return sum(kept.values()), out


@pytest.mark.parametrize(("recompute", "share"), [("cheap", 0.7), ("blocks", 0.25)])
def test_recomputation_changes_memory_and_nothing_else(recompute, share):
    model = awake(DiTConfig(width=32, layers=6, heads=4))
    arguments = inputs(SHAPE * 4)
    results = []
    for model.recompute in ("none", recompute):
        model.zero_grad()
        kept, out = kept_bytes(model, *arguments)
        out.square().sum().backward()
        results.append((kept, out, [p.grad for p in model.parameters()]))
    (plain, out, grads), (less, again, same) = results
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert less < share * plain


def test_crystals_do_not_influence_one_another():
    model = awake()
    x, t, batch, ptr = inputs(SHAPE)
    x.requires_grad_()
    mine = batch == 2
    model(x, t, batch, ptr)[mine].square().sum().backward()
    assert (x.grad[mine] != 0).all()
    assert not x.grad[~mine].any()


def test_order_of_crystals_does_not_matter():
    model = awake()
    x, t, batch, ptr = inputs(SHAPE)
    whole = model(x, t, batch, ptr)
    for i, n in enumerate(SHAPE):
        alone = model(x[batch == i], t[i : i + 1], *pack([n]))
        assert torch.allclose(whole[batch == i], alone, rtol=1e-9, atol=1e-9)


def test_order_of_atoms_matters_only_with_index_embedding():
    x, t, batch, ptr = inputs([4, 6, 3])
    order = torch.cat(
        [torch.tensor([2, 0, 3, 1]), torch.arange(13).flip(0)[3:9], torch.tensor([11, 12, 10])]
    )
    assert torch.equal(batch[order], batch)
    for index_embed in (False, True):
        model = awake(DiTConfig(width=32, layers=2, heads=4, index_embed=index_embed))
        same = torch.allclose(model(x[order], t, batch, ptr), model(x, t, batch, ptr)[order])
        assert same is not index_embed


def test_time_reaches_the_output():
    model = awake()
    x, t, batch, ptr = inputs(SHAPE)
    assert not torch.allclose(model(x, t, batch, ptr), model(x, t + 0.1, batch, ptr))


def test_per_crystal_gradients():
    where = layout([2, 1, 3])
    generator = torch.Generator().manual_seed(0)
    x, scale, shift = (
        torch.randn(n, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (6, 3, 3)
    )
    assert torch.autograd.gradcheck(lambda a, b, c: per_crystal(a, b, c, where), (x, scale, shift))
    assert torch.autograd.gradcheck(lambda a, b: per_crystal(a, b, None, where), (x, scale))


def test_bf16_stays_near_fp32():
    model = awake().float()
    for p in model.parameters():
        p.data *= 0.3
    x, t, batch, ptr = inputs(SHAPE)
    x, t = x.float().requires_grad_(), t.float()
    exact = model(x, t, batch, ptr)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, t, batch, ptr)
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()
    rough.float().sum().backward()
    assert x.grad.dtype == torch.float32 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"width": 30, "heads": 4}, "multiple of dit.heads"),
        ({"width": 15, "heads": 3}, "even"),
        ({"attention": "jaged"}, "did you mean 'jagged'"),
    ],
)
def test_bad_config_is_named(wrong, word):
    with pytest.raises(ValueError, match=word):
        DiTConfig(**wrong)


def test_the_trial_of_variable_length_attention_measures_a_difference(monkeypatch):
    kind = (torch.device("cpu"), torch.float32, 2, 8)
    assert attention._trial(*kind) < 1e-5
    monkeypatch.setattr(attention, "jagged", lambda qkv, where: 1.2 * attention.padded(qkv, where))
    assert attention._trial(*kind) > 0.1


@pytest.mark.parametrize("outcome", ["agrees", "differs", "fails"])
def test_a_gpu_takes_variable_length_attention_only_after_a_good_trial(
    outcome, monkeypatch, caplog
):
    def trial(*kind):
        if outcome == "fails":
            raise RuntimeError("no kernel")
        return {"agrees": 1e-3, "differs": 0.3}[outcome]

    monkeypatch.setattr(attention, "_trial", trial)
    path = attention.choose.__wrapped__(torch.device("cuda"), torch.bfloat16, 12, 64)
    assert path == ("jagged" if outcome == "agrees" else "grouped")
    assert bool(caplog.records) is (outcome != "agrees")
