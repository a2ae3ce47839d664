"""The Triton kernels equal the plain definitions; in Triton's interpreter where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from crysforge.models import kernels
from crysforge.models.kernels import self_test as trial
from crysforge.models.ops import dispatch
from crysforge.models.ops import segments as ops
from crysforge.models.ops.edges import row_sum
from tests.devices import DEVICE, needs_gpu, needs_triton

CPU = torch.device("cpu")
SHAPES = {
    "some nodes without edges": (6, 17, 5, 20),
    "no edge": (4, 0, 3, 8),
    "no node": (0, 0, 2, 8),
    "one edge": (1, 1, 1, 8),
    "one channel": (3, 9, 2, 1),
}
NAMES = [case.name for case in trial.cases(trial.random_edges(2, 2, 2), 4)]


def case_of(name, edges, width):
    return next(c for c in trial.cases(edges, width) if c.name == name)


@needs_triton
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_their_definitions(name, shape):
    nodes, count, rows, width = SHAPES[shape]
    edges = trial.random_edges(nodes, count, rows)
    if name == "comformer_messages" and count == 1:
        pytest.skip("one edge has no batch statistics")
    case = case_of(name, edges, width)
    assert max(trial.differences(case, edges, DEVICE, torch.float32, "triton")) < 1e-5


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_near_the_definition(name, dtype):
    edges = trial.random_edges(5, 16, 4)
    case = case_of(name, edges, 16)
    worst = max(trial.differences(case, edges, DEVICE, dtype, "triton"))
    assert worst < trial.TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_reruns_are_bit_equal(name):
    edges = trial.random_edges(3, 20, 4)
    case = case_of(name, edges, 8)
    first, second = (trial.results(case, edges, DEVICE, torch.float32, "triton") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_inputs_may_lie_in_any_order_in_memory(name):
    edges = trial.random_edges(4, 12, 4)
    case = case_of(name, edges, 8)
    lying = trial.Case(name, case.function, tuple(map(transposed, case.inputs)), case.parameters)
    assert max(trial.differences(lying, edges, DEVICE, torch.float32, "triton")) < 1e-5


def transposed(x):
    """The same values, the last two dimensions exchanged in memory."""
    return x.mT.contiguous().mT


@needs_triton
@pytest.mark.parametrize("name", [n for n in NAMES if n != "matformer_messages"])
def test_long_segments_and_many_programs(name):
    edges = trial.random_edges(6, 200, 9)
    case = case_of(name, edges, 130)  # more than one tile of channels
    assert max(trial.differences(case, edges, DEVICE, torch.float32, "triton")) < 1e-4


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_million_edges(name, dtype):
    edges = trial.random_edges(40_000, 1_000_000, 30_000)
    case = case_of(name, edges, 64)
    results = [trial.results(case, edges, DEVICE, dtype, c) for c in ("triton", "torch", "triton")]
    for ours, plain, again in zip(*results, strict=True):
        assert torch.equal(ours, again)
        size = plain.double().abs().max()
        away = (ours.double() - plain.double()).abs().max()
        assert away < {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype] * size


@needs_triton
def test_the_trial_passes_and_names_a_wrong_kernel(monkeypatch):
    case = case_of("segment_sum", trial.random_edges(12, 90, 9), 8)
    monkeypatch.setattr(trial, "cases", lambda *_: iter([case]))
    trial.check(DEVICE, torch.float32)
    right = row_sum.twin
    monkeypatch.setattr(row_sum, "twin", lambda x, matrix: 1.01 * right(x, matrix))
    with pytest.raises(RuntimeError, match="segment_sum differs"):
        trial.check(DEVICE, torch.float32)


@needs_triton
@pytest.mark.skipif(os.name != "posix", reason="Triton's compilers are for Linux")
def test_every_kernel_compiles_for_gpus_without_atomics():
    """With the compilers that come with Triton; no GPU is needed for that."""
    script = Path(__file__).with_name("compile_kernels.py")
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), "80"], capture_output=True, text=True, env=environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = set(done.stdout.split())
    named = {"_row_sum", "_gather", "_silu_grad", "_moments", "_gate_grad", "_gated_grad"}
    assert named < compiled and len(compiled) >= 17


def test_kernels_start_on_the_gpu_that_their_input_is_on(monkeypatch):
    op, x, places = ops.Op(lambda x: x), torch.ones(1), []
    op.has_twin(lambda x: x + len(places))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: places.append(x) or nullcontext())
    with kernels.using("torch"):
        assert op(x) == 1 and not places
    with dispatch.forced("triton"):
        assert op(x) == 2 and places[0] is x


def test_the_trial_leaves_torchs_generator_alone():
    edges = trial.random_edges(3, 9, 2)
    before = torch.get_rng_state()
    trial.results(case_of("comformer_messages", edges, 4), edges, CPU, torch.float32, "torch")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_choice_of_kernels(monkeypatch):
    x = torch.ones(2)
    monkeypatch.delenv("CRYSFORGE_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "enabled", set())
    kernels.enable(CPU)
    assert not dispatch.wanted(x)  # a CPU takes the definitions
    monkeypatch.setenv("CRYSFORGE_KERNELS", "trion")
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        kernels.enable(CPU)
    with dispatch.forced("triton"):
        assert dispatch.wanted(x) and not dispatch.wanted(x.double())
        with kernels.using("torch"):
            assert not dispatch.wanted(x)


@needs_triton
def test_kernels_serve_what_they_were_enabled_for(monkeypatch):
    monkeypatch.setattr(dispatch, "enabled", set())
    monkeypatch.setenv("CRYSFORGE_KERNELS", "triton")
    kernels.enable(DEVICE, {torch.float32})
    assert dispatch.wanted(torch.ones(2, device=DEVICE))
    assert not dispatch.wanted(torch.ones(2, device=DEVICE, dtype=torch.bfloat16))
    monkeypatch.setenv("CRYSFORGE_KERNELS", "torch")
    kernels.enable(DEVICE, {torch.float32})
    assert not dispatch.wanted(torch.ones(2, device=DEVICE))


def test_asking_for_kernels_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    word = "TRITON_INTERPRET" if importlib.util.find_spec("triton") else "not installed"
    with pytest.raises(ValueError, match=word):
        kernels._usable.__wrapped__("triton", CPU, torch.float32)


@pytest.mark.parametrize("fails", [False, True])
def test_a_gpu_takes_the_kernels_only_after_a_good_trial(fails, monkeypatch, caplog):
    def check(device, dtype):
        if fails:
            raise RuntimeError("row_sum differs\nand more")

    monkeypatch.setattr(trial, "check", check)
    monkeypatch.setattr(kernels, "MODULES", ())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    choose = kernels._usable.__wrapped__
    assert choose("auto", torch.device("cuda"), torch.float32) is not fails
    assert ("row_sum differs" in caplog.text) is fails
    assert "and more" not in caplog.text
