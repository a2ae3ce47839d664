"""The import rules of the packages (docs/architecture.md) hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"datapipe", "models", "trainer", "launch"}
FORBIDDEN = {
    "datapipe": {"models", "trainer", "launch", "deepspeed", "submitit"},
    "models": {"trainer", "launch", "deepspeed", "webdataset", "pymatgen", "submitit"},
    "trainer": {"launch", "submitit"},
    "launch": set(),
}


def imports(path: Path) -> set[str]:
    """Every module a file imports anywhere, in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


FILES = [p for name in sorted(PACKAGES) for p in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_left_to_right(path):
    package = path.relative_to(ROOT).parts[0]
    modules = imports(path)
    assert not {m.split(".")[0] for m in modules} & FORBIDDEN[package]
    if package == "models":
        ours = {m for m in modules if m.split(".")[0] == "datapipe"}
        assert {m for m in ours if not m.startswith("crysforge.datapipe.common.")} <= {
            "crysforge.datapipe.schema"
        }


def calls(path: Path) -> set[str]:
    """What a file calls, as written: `torch.load`, `eval`; with `shell=True` as `shell`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
            found |= {k.arg for k in node.keywords if k.arg == "shell"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path):
    refused = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "yaml.load", "shell"}
    refused |= {"os.system", "yaml.unsafe_load", "yaml.full_load"}
    assert not calls(path) & refused
