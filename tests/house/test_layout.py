"""The rules of the house (docs/architecture.md) hold: who may import whom, and how much a folder, a
file and a function may hold."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = [
    "datapipe.common",
    "datapipe.crystals",
    "datapipe",
    "datapipe.storage",
    "datapipe.graphs",
    "datapipe.cif.groups",
    "datapipe.cif",
    "datapipe.sources",
    "datapipe.loading",
    "datapipe.preparing.duplicates",
    "datapipe.preparing",
    "models",
    "models.ops",
    "models.layers",
    "models.objectives",
    "models.denoisers",
    "models.kernels",
    "models.encoders",
    "trainer",
    "trainer.base",
    "trainer.stages",
    "trainer.engines",
    "trainer.runs",
    "trainer.figures",
    "trainer.loop",
    "trainer.jobs",
    "trainer.serving",
    "trainer.analysis",
    "trainer.evaluation",
    "trainer.reports",
    "launch.cluster",
    "launch",
]
"""Folders from the ground up: each imports those before it alone."""
MAY_USE = {
    "datapipe": {"datapipe"},
    "models": {"models", "datapipe.common", "datapipe"},
    "trainer": {"trainer", "models", "datapipe"},
    "launch": {"launch", "trainer", "models", "datapipe"},
}
"""Packages, or of `datapipe` its schema and `common`."""
HEAVY = {
    "datapipe": {"deepspeed", "submitit"},
    "models": {"deepspeed", "webdataset", "pymatgen", "submitit"},
    "trainer": {"submitit"},
    "launch": set(),
}
"""Packages of others that a package must not need."""
MOST_FILES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 11, 300, 60
LARGE = {"datapipe.sources", "models.encoders", "launch"}
"""Folders of things that are alike."""

FILES = [p for name in MAY_USE for p in sorted((ROOT / name).rglob("*.py"))]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(path: Path) -> str:
    return ".".join(path.parent.relative_to(ROOT).parts)


MODULES = {module(p): p for p in FILES}


def imports(path: Path, inside: ast.AST | None = None) -> dict[str, int]:
    """Every module that a file imports, in full and without `crysforge.`, and where."""
    found: dict[str, int] = {}
    for node in ast.walk(inside or tree(path)):
        if isinstance(node, ast.Import):
            found |= {a.name: node.lineno for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{a.name}" for a in node.names}
            names = {n if n.removeprefix("crysforge.") in MODULES else node.module for n in whole}
            found |= dict.fromkeys(names, node.lineno)
    return {name.removeprefix("crysforge."): line for name, line in found.items()}


def ours(path: Path, inside: ast.AST | None = None) -> dict[str, int]:
    return {name: line for name, line in imports(path, inside).items() if name in MODULES}


@each_file
def test_imports_go_down(path):
    here = room(path)
    assert here in ROOMS, f"{here} has no place in ROOMS"
    package = here.split(".")[0]
    for name, line in ours(path).items():
        there = room(MODULES[name])
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert there == here or ROOMS.index(there) < ROOMS.index(here), f"{where}, which is above"
        assert {there, there.split(".")[0]} & MAY_USE[package], where
    if package == "models":
        used = {n for n in ours(path) if n.split(".")[0] == "datapipe"}
        assert all(n == "datapipe.schema" or n.startswith("datapipe.common.") for n in used), used
    others = {name.split(".")[0] for name in imports(path)}
    assert not others & HEAVY[package], (
        f"{path.relative_to(ROOT)} imports {others & HEAVY[package]}"
    )
    assert not others & set(MAY_USE) - {n.split(".")[0] for n in ours(path)}, "without crysforge."


def test_there_is_no_circle_of_imports():
    """Of files, since folders go down: no file can be reached from itself."""
    state: dict[str, int] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above, name])
        if state.setdefault(name, 0):
            return
        for other in ours(MODULES[name]):
            visit(other, (*above, name))
        state[name] = 1

    for name in MODULES:
        visit(name, ())


@each_file
def test_our_own_code_is_imported_at_the_top(path):
    """A recipe may import what is heavy after its arguments were parsed."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef) or node.name == "__getattr__":
            continue
        inner = {k: v for k, v in ours(path, node).items() if k != module(path)}
        if room(path) == "launch" and inner:
            parsed = [n.lineno for n in ast.walk(node) if isinstance(n, ast.Call)
                      and ast.unparse(n.func) in ("parse", "Request.parse")]  # fmt: skip
            assert parsed, f"{path.name}: {node.name} imports {[*inner]} and parses nothing"
            assert min(inner.values()) > parsed[0], f"{path.name}: {node.name} imports too early"
        else:
            assert not inner, f"{path.relative_to(ROOT)}: {node.name} imports {[*inner]}"


@each_file
def test_files_and_functions_are_of_a_size_to_read(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{path.relative_to(ROOT)} has {lines} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            long = node.end_lineno - node.lineno + 1
            where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            assert long <= MOST_LINES_OF_A_FUNCTION, f"{where} has {long} lines"


def test_folders_are_of_a_size_to_find_things_in():
    count = Counter(room(p) for p in FILES if p.name != "__init__.py")
    for name, files in count.items():
        assert files <= MOST_FILES or name in LARGE, f"{name} has {files} files"


def test_tests_lie_where_the_code_does():
    """A folder of tests for every folder of code that has any, and none for what is not there."""
    mirrored = {"datapipe", "models", "trainer", "launch"}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        parts = path.parent.relative_to(ROOT / "tests").parts
        if parts and parts[0] in mirrored:
            assert ".".join(parts[:2]) in ROOMS, path.relative_to(ROOT)


def test_no_class_name_is_there_twice():
    names: dict[str, str] = {}
    for path in FILES:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in names, (
                    f"{node.name} is in {names[node.name]} and {path.relative_to(ROOT)}"
                )
                names[node.name] = str(path.relative_to(ROOT))


def calls(path: Path) -> set[str]:
    """What a file calls, as written: `torch.load`, `eval`; with `shell=True` as `shell`."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
            found |= {k.arg for k in node.keywords if k.arg == "shell"}
    return found


@each_file
def test_no_file_runs_what_it_reads(path):
    refused = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "yaml.load", "shell"}
    refused |= {"os.system", "yaml.unsafe_load", "yaml.full_load"}
    assert not calls(path) & refused
