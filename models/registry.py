"""Names for interchangeable parts, and configs from plain mappings with helpful errors."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

T = TypeVar("T")

_MOST = 1e30
"""Largest number that a setting may have; products with usual numbers are finite in single
precision."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence that lists the choices and names the nearest one."""
    choices = sorted(choices)
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}valid: {', '.join(choices)}"


class Registry(Generic[T]):
    """Classes by name; an unknown name is an error that lists the choices.

    With `plugins`, other packages add to it: whatever they declare under this entry point group
    (`name = module:Class`) has a name here, and is imported when first asked for.
    """

    def __init__(self, kind: str, plugins: str | None = None) -> None:
        self.kind = kind
        self.plugins = plugins
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator: makes the class available under `name`."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            if name not in (offered := self._offered()):
                raise ValueError(f"unknown {self.kind} {name!r}: {nearest(str(name), self)}")
            try:
                item = offered[name].load()
            except Exception as error:  # it is not our code
                raise ValueError(
                    f"plug-in {self.kind} {name!r} ({offered[name].value}) does not load: "
                    f"{type(error).__name__}: {error}"
                ) from error
            self._items.setdefault(name, item)  # it may have registered itself meanwhile
        return self._items[name]

    def __iter__(self):
        return iter(sorted({*self._items, *self._offered()}))

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._offered()

    def _offered(self) -> dict[str, EntryPoint]:
        points = entry_points(group=self.plugins) if self.plugins else ()
        return {point.name: point for point in points}


def configure(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds dataclass `cls` from a mapping, converting and checking types.

    Raises:
        ValueError: an unknown key (names the nearest valid one), a value of the wrong type, or a
            number that is not finite or out of all proportion. `where` is the dotted prefix of the
            section, for the message.
    """
    prefix = f"{where}." if where else ""
    _check_sections(cls, values, prefix)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), dict(values))
        _check_numbers(OmegaConf.to_container(merged), where)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except ConfigKeyError as error:
        full = str(error.full_key or error.key)
        *path, key = full.split(".")
        valid = _fields_at(cls, path)
        raise ValueError(f"unknown config key {prefix + full!r}: {nearest(key, valid)}") from None
    except OmegaConfBaseException as error:
        key = prefix + str(error.full_key or error.key)
        reason = str(error).splitlines()[0]
        if "is not a ListConfig" in reason:
            reason = f"give a list: {key}=[…]"
        raise ValueError(f"config key {key!r}: {reason}") from None


def _check_sections(cls: Any, values: Mapping[str, Any], prefix: str) -> None:
    """Raises ValueError for a section that is given as a value, or a value as a section."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        hint = hints.get(key)
        either = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if either else (hint,)
        section = next((o for o in options if dataclasses.is_dataclass(o)), None)
        has_keys = section is not None or any(typing.get_origin(o) is dict for o in options)
        if isinstance(value, Mapping) and section is not None:
            _check_sections(section, value, f"{prefix}{key}.")
        elif isinstance(value, Mapping) and key in hints and not has_keys and Any not in options:
            raise ValueError(f"config key {prefix + key!r} has no keys below it: give it a value")
        elif has_keys and not isinstance(value, Mapping) and value is not None:
            raise ValueError(f"config key {prefix + key!r} is a section: give {prefix}{key}.NAME=…")


_RANGES = {"seed": (0, 2**63 - 1), "layers": (0, 1000), "workers": (0, 1024)}
"""Least and largest value of settings by the last word of their names, wherever they are."""


def _check_numbers(value: Any, key: str) -> None:
    """Raises ValueError for a number that no setting can have, or none of that name."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_numbers(item, f"{key}[{i}]")
    elif isinstance(value, int | float):
        least, most = _RANGES.get(re.split(r"[._]", key)[-1], (-(2**63), 2**63 - 1))
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"config key {key!r}: {value} is no finite number")
        if isinstance(value, int) and not least <= value <= most:
            raise ValueError(f"config key {key!r} must be {least} to {most}, got {value}")
        if abs(value) > _MOST:
            raise ValueError(f"config key {key!r}: {value:g} is beyond all numbers in use")


def _fields_at(cls: Any, path: list[str]) -> list[str]:
    for name in path:
        hint = typing.get_type_hints(cls).get(name)
        options = [hint, *typing.get_args(hint)]
        cls = next((o for o in options if dataclasses.is_dataclass(o)), None)
        if cls is None:
            return []
    return [f.name for f in dataclasses.fields(cls)]
