"""Compiles every Triton kernel for a GPU that need not be there, as the operations start it.

python tests/models/kernels/compile_kernels.py 90        prints the kernels' names
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crysforge.models import kernels
from crysforge.models.kernels import self_test as trial

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    int: "i32",
    float: "fp32",
}
ELEMENTWISE = {"_silu_grad"}
"""What they overwrite nobody needs but the thread that does."""
seen: dict[tuple, str] = {}


def waits(ttgir: str) -> bool:
    """Whether all warps have loaded what one of them overwrites: small tiles are loaded by several,
    which share their sums."""
    loaded: set[str] = set()
    for line in ttgir.splitlines():
        if "barrier" in line:
            loaded.clear()
        elif found := re.search(r"tt\.(load|store) (%\w+)", line):
            if found[1] == "store" and found[2] in loaded:
                return False
            loaded.add(found[2])
    return True


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
    # By place, as Triton 3.2 has another name for the constants.
    source = ASTSource(self, {n: signature[n] for n in self.arg_names}, constants)
    asm = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm
    assert not re.search(r"\b(atom|red)\.", asm["ptx"]), f"{self.__name__} has atomics"
    assert waits(asm["ttgir"]) or self.__name__ in ELEMENTWISE, f"{self.__name__} does not wait"
    seen[key] = self.__name__


def main() -> None:
    triton.JITFunction.run = compile_instead
    kernels.register()
    edges = trial.random_edges(6, 17, 5)
    for case in trial.cases(edges, 16):
        trial.results(case, edges, torch.device("cpu"), torch.bfloat16, "triton")
    print("\n".join(sorted(set(seen.values()))))


main()
