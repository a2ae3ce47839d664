"""Twins and definitions on one small case: the trial a GPU has to pass, and the tests' measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crysforge.models import kernels
from crysforge.models.ops import messages, modulation, norm
from crysforge.models.ops import segments as ops
from crysforge.models.ops.attention import Layout
from crysforge.models.ops.edges import Edges
from crysforge.models.ops.norm import BatchNorm

TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference, over the largest value of the definition in fp64. In fp32 that of matrix
products in tf32, which a user may have allowed."""


@dataclass
class Case:
    """A function of tensors that has a twin; a gradient is taken of those that have one."""

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...] = ()
    """Further leaves, as wide as the inputs or wider."""


def random_edges(nodes: int, edges: int, rows: int, seed: int = 0) -> Edges:
    """Edges with multiplicities 1 to 3 into nodes of which some have none, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, max(nodes, 1), (edges,), generator=g).sort().values
    count = torch.randint(1, 4, (edges,), generator=g)
    atoms = torch.randint(1, 4, (nodes,), generator=g)
    return Edges(
        source=torch.randint(0, max(nodes, 1), (edges,), generator=g),
        target=target,
        row=torch.randint(0, max(rows, 1), (edges,), generator=g),
        ptr=torch.bincount(target + 1, minlength=nodes + 1).cumsum(0),
        count=count.float(),
        weight=(count * atoms[target]).float(),
        rows=rows,
    )


def edges_on(edges: Edges, device: torch.device) -> Edges:
    """The same edges on a device."""
    names = ("source", "target", "row", "ptr", "count", "weight")
    return Edges(**{n: getattr(edges, n).to(device) for n in names}, rows=edges.rows)


def cases(edges: Edges, width: int, heads: int = 2, seed: int = 0) -> Iterator[Case]:
    """Every operation that has a twin, in fp64 on the CPU."""
    n, e, r = edges.num_nodes, len(edges), edges.rows
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    yield Case("gather_sum", _of(ops.gather_sum), (random(2 * n + r, width),))
    yield Case("gather_source", _of(ops.gather_source), (random(n, width),))
    yield Case("segment_sum", _of(ops.segment_sum), (random(e, width),))
    yield Case("segment_softmax", _of(ops.segment_softmax), (4 * random(e, width),))
    yield Case("moments", _moments, (random(e, width) + 3,))
    table = (2 * n + r, width)
    yield Case(
        "comformer_messages",
        _comformer,
        (random(n, width), random(*table), random(*table)),
        (*_linear(random, width, width), *_linear(random, width, width), *_affine(random, width)),
    )
    yield Case(
        "matformer_messages",
        _matformer,
        (
            random(n, heads, width),
            random(n, heads, width),
            random(r, heads, width),
            random(2 * n + r, heads * 3 * width),
        ),
        (
            *_affine(random, 3 * width),
            *_linear(random, 3 * width, width),
            *_affine(random, width),
        ),
    )
    crystals = random(n, width)
    yield Case("modulated_norm", _modulated_norm, (random(e, width), crystals, random(n, width)))
    yield Case("gated_add", _gated_add, (random(e, width), random(e, width)), (random(n, width),))


def _linear(random, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return random(outputs, inputs) / inputs**0.5, random(outputs)


def _affine(random, width: int) -> tuple[Tensor, Tensor]:
    return 1 + 0.3 * random(width), random(width)


def _of(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda edges, x: (op(x, edges),)


def _moments(edges: Edges, x: Tensor) -> tuple[Tensor, ...]:
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return tuple(norm.moments(wide, edges.weight.to(wide.dtype)))


class _Local(BatchNorm):
    """Statistics of this process alone: other ranks may not be here."""

    synchronised = False


def _comformer(edges: Edges, query, keys, values, wk, bk, wv, bv, gamma, beta):
    layers = _module(nn.Linear, wk, bk), _module(nn.Linear, wv, bv)
    batch_norm = _module(_Local, gamma, beta)
    out = messages.comformer_messages(query, keys, values, *layers, batch_norm, edges)
    return out, batch_norm.running_mean.clone(), batch_norm.running_var.clone()


def _matformer(edges: Edges, query, key, feature, values, wg, bg, wm, bm, wn, bn):
    modules = (
        _module(nn.LayerNorm, wg, bg),
        _module(nn.Linear, wm, bm),
        _module(nn.LayerNorm, wn, bn),
    )
    return (messages.matformer_messages(query, key, feature, values, *modules, edges),)


def _module(kind: type[nn.Module], weight: Tensor, bias: Tensor) -> Any:
    """A module whose weight and bias are these tensors themselves."""
    shape = weight.shape[::-1] if weight.dim() == 2 else weight.shape
    module = kind(*shape).to(weight)
    del module.weight, module.bias
    module.weight, module.bias = weight, bias
    return module


def _layout(edges: Edges) -> Layout:
    """The edges into a node as the tokens of a crystal."""
    return Layout(edges.ptr, edges.target, ())


def _modulated_norm(edges: Edges, x, shift, scale):
    wide = torch.promote_types(x.dtype, torch.float32)
    return (modulation.modulated_norm(x, shift.to(wide), scale.to(wide), _layout(edges)),)


def _gated_add(edges: Edges, x, update, gate):
    return (modulation.gated_add(x, update, gate, _layout(edges)),)


def results(
    case: Case, edges: Edges, device: torch.device, dtype: torch.dtype, choice: str
) -> list[Tensor]:
    """Outputs, then gradients, of a case whose inputs are given in a dtype; parameters stay in
    fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),  # keeps the global RNG state unchanged
        kernels.using(choice),
    ):
        leaves = [x.to(device, dtype).requires_grad_() for x in case.inputs]
        leaves += [x.to(device, wide).requires_grad_() for x in case.parameters]
        with torch.autocast(device.type, enabled=False):
            out = case.function(edges_on(edges, device), *leaves)
        upstream = torch.linspace(-1, 1, max(out[0].numel(), 1), dtype=torch.float64)
        if out[0].requires_grad:
            loss = (out[0] * upstream[: out[0].numel()].view(out[0].shape).to(out[0])).sum()
            grads = torch.autograd.grad(loss, leaves)
        else:
            grads = ()
    return [x.detach() for x in (*out, *grads)]


def differences(
    case: Case, edges: Edges, device: torch.device, dtype: torch.dtype, choice: str
) -> list[float]:
    """Largest differences from the definition in fp64, relative to its largest value, for every
    output and gradient."""
    cpu = torch.device("cpu")
    rounded = Case(case.name, case.function, *_rounded(case, dtype))
    exact = results(rounded, edges, cpu, torch.float64, "torch")
    found = results(rounded, edges, device, dtype, choice)
    out = []
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape, f"{case.name}: {tuple(a.shape)} instead of {tuple(b.shape)}"
        size = float(b.abs().max()) if b.numel() else 0.0
        away = float((a.cpu().double() - b).abs().max()) if b.numel() else 0.0
        out.append(away / size if size > 1e-9 else away)
    return out


def _rounded(case: Case, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs as they are after a pass through dtype, so that rounding them counts for nobody."""
    return (
        tuple(x.to(dtype).double() for x in case.inputs),
        tuple(x.float().double() for x in case.parameters),
    )


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises RuntimeError naming an operation whose twin is wrong on this device."""
    edges = random_edges(12, 90, 9)
    for case in cases(edges, 32):
        worst = max(differences(case, edges, device, dtype, "triton"))
        if not worst < TOLERANCE[dtype]:
            raise RuntimeError(f"{case.name} differs from its definition by {worst:.1e}")
