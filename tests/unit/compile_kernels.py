"""Compiles every Triton kernel for a GPU that need not be there, as the operations start it.

python tests/unit/compile_kernels.py 90        prints the kernels' names
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models import kernels
from models.kernels import trial

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    int: "i32",
    float: "fp32",
}
seen: dict[tuple, str] = {}


def compile_instead(self, *args, grid=None, warmup=False, **kwargs) -> None:
    """In the place of `JITFunction.run`."""
    values = dict(zip(self.arg_names, args, strict=False)) | kwargs
    constants = {p.name: values[p.name] for p in self.params if p.is_constexpr}
    signature = {
        name: "constexpr" if name in constants else TYPES[getattr(value, "dtype", type(value))]
        for name, value in values.items()
    }
    key = (self.__name__, *signature.values(), *constants.values())
    if key in seen:
        return
    places = {(self.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(self, signature={n: signature[n] for n in self.arg_names}, constexprs=places)
    ptx = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", ptx), f"{self.__name__} has atomics"
    seen[key] = self.__name__


def main() -> None:
    triton.JITFunction.run = compile_instead
    kernels.wanted = lambda x: x.dtype in TYPES and kernels._forced == "triton"
    for module in kernels._MODULES:
        __import__(f"models.kernels.{module}")
    edges = trial.random_edges(6, 17, 5)
    for case in trial.cases(edges, 16):
        trial.results(case, edges, torch.device("cpu"), torch.bfloat16, "triton")
    print("\n".join(sorted(set(seen.values()))))


main()
