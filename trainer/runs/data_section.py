"""The `data` section of a model's config: what it says of the data set that it learned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crysforge.datapipe.schema import MAX_Z


def check_data(data: Mapping[str, Any], where: str) -> None:
    """Checks the types of what is shown of a data set; everything may be missing.

    Raises:
        ValueError: a value of another type, or an atomic number that is none; `where` names the
            file.
    """
    _check(where, data, "fingerprint", "text", lambda v: isinstance(v, str))
    _check(where, data, "labels", "a whole number", _is_count)
    _check(where, data, "fold", "a whole number", _is_count)
    _check(
        where,
        data,
        "elements",
        f"a list of atomic numbers from 1 to {MAX_Z}",
        lambda v: isinstance(v, list) and all(_is_count(z) and 0 < z <= MAX_Z for z in v),
    )
    _check(
        where,
        data,
        "splits",
        "numbers of crystals by split",
        lambda v: isinstance(v, dict) and all(map(_is_count, v.values())),
    )
    _check(
        where,
        data,
        "targets",
        "a section for each label, with its unit",
        lambda v: isinstance(v, dict) and all(_is_target(t) for t in v.values()),
    )
    _check(where, data, "provenance", "a section", lambda v: isinstance(v, dict))


def _check(where: str, data: Mapping[str, Any], key: str, right: str, is_right: Any) -> None:
    value = data.get(key)
    if value is not None and not is_right(value):
        raise ValueError(f"{where} is damaged: data.{key} must be {right}, got {repr(value)[:60]}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_target(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("unit"), str | None)
