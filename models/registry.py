"""Interchangeable parts by name: encoders, stages, sources, and those of plug-ins."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Generic, TypeVar

from crysforge.datapipe.common.names import nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Parts by name; an unknown name is an error that lists the choices.

    Args:
        kind: what the parts are, for messages.
        modules: name → module of ours that registers it when it is imported, which is when the
            name is first asked for: a part costs nothing to those who do not use it.
        plugins: entry point group under which other packages declare more
            (`name = module:Class`); imported when first asked for.
    """

    def __init__(
        self, kind: str, modules: Mapping[str, str] | None = None, plugins: str | None = None
    ) -> None:
        self.kind, self.plugins = kind, plugins
        self.modules = dict(modules or {})
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: makes a class or function available under `name`."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if not isinstance(name, str):
            raise ValueError(f"unknown {self.kind} {repr(name)[:80]}: {nearest('', self)}")
        if name not in self._items and name in self.modules:
            importlib.import_module(self.modules[name])
        if name not in self._items:
            self._items.setdefault(name, self._plugin(name))  # it may have registered itself
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._items, *self.modules, *self._offered()}))

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self.modules or name in self._offered()

    def _plugin(self, name: str) -> T:
        offered = self._offered()
        if name not in offered:
            raise ValueError(f"unknown {self.kind} {name!r}: {nearest(str(name), self)}")
        try:
            return offered[name].load()
        except Exception as error:  # it is not our code
            raise ValueError(
                f"plug-in {self.kind} {name!r} ({offered[name].value}) does not load: "
                f"{type(error).__name__}: {error}"
            ) from error

    def origin(self, name: str) -> str:
        """Where a plug-in comes from: package, version and a hash of its sources; empty for what is
        no plug-in."""
        if name not in (offered := self._offered()):
            return ""
        point = offered[name]
        package = "" if point.dist is None else f"{point.dist.name} {point.dist.version}, "
        spec = importlib.util.find_spec(point.module.partition(".")[0])
        folders = [Path(p) for p in (spec and spec.submodule_search_locations) or ()]
        files = [(f.relative_to(folder), f) for folder in folders for f in folder.rglob("*.py")]
        if not files and spec is not None and spec.has_location and spec.origin:
            files = [(Path(point.module), Path(spec.origin))]
        digest = hashlib.sha256()
        for relative, file in sorted(files):
            digest.update(f"{relative}\n".encode() + file.read_bytes())
        return f"{package}sources {digest.hexdigest()[:16]}"

    def _offered(self) -> dict[str, EntryPoint]:
        points = entry_points(group=self.plugins) if self.plugins else ()
        return {point.name: point for point in points}
