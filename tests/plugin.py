"""Packages with encoders or stages, as another project would install them: those of the docs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from crysforge.models.encoders import ENCODERS
from crysforge.models.registry import Registry

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "encoders.md").read_text()


def block(language: str, page: str = PAGE) -> str:
    """A page's last block of code in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no block of {language}"
    return found[-1]


@contextmanager
def installed(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    modules: Mapping[str, str] | None = None,
    *,
    page: str = PAGE,
    registry: Registry = ENCODERS,
    **more: str,
) -> Iterator[None]:
    """A page's package in an empty directory where Python finds it, with `modules` (name →
    source) beside its own and `more` entry points (name → module:Class)."""
    name, target = re.findall(r'^(\w+) = "(.*)"$', block("toml", page), re.MULTILINE)[0]
    group = re.findall(r'^\[project\.entry-points\."(.*)"\]$', block("toml", page), re.MULTILINE)[0]
    own = target.split(":")[0]
    sources = {own: block("python", page), **(modules or {})}
    for module, source in sources.items():
        (root / f"{module}.py").write_text(source)
    info = root / f"{own}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {own}\nVersion: 1.0\n")
    points = {name: target, **more}
    lines = [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(root)
    for name in registry.modules:  # ours stay when what is patched is undone
        registry[name]
    monkeypatch.setattr(registry, "_items", dict(registry._items))
    yield
    for module in sources:
        sys.modules.pop(module, None)
