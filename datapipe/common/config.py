"""Dataclasses from plain mappings, with errors that name the key and what would be right."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from crysforge.datapipe.common.escape import brief
from crysforge.datapipe.common.names import nearest

T = TypeVar("T")


def configure(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds dataclass `cls` from a mapping, converting and checking types.

    Raises:
        ValueError: an unknown key (names the nearest valid one), a value of the wrong type, or a
            number that is not finite or out of all proportion. `where` is the dotted prefix of the
            section, for the message.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'a section'} must be settings by name, not {brief(values)}")
    refuse_references(values, f"{where}: " if where else "")
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


def refuse_references(values: Any, where: str = "", key: str = "") -> None:
    """Raises ValueError for a text that stands for something else, as `${oc.env:NAME}` does: one
    that is not typed may send a secret away, and one that is typed has been looked up by now."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            refuse_references(name, where, key)
            refuse_references(value, where, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            refuse_references(value, where, key)
    elif isinstance(values, str) and "${" in values:
        raise ValueError(
            f"{where}{key or 'a setting'} refers to values elsewhere (${{…}}): write them out, or "
            "type the setting on the command line"
        )


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


_MOST = 1e30
"""Largest number that a setting may have; products with usual numbers are finite in single
precision."""
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
