"""Sweeps: from a grid or a list of settings to the values and the name of each run."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crysforge.datapipe.common.config import refuse_references
from crysforge.datapipe.common.safe_names import file_part
from crysforge.trainer.base.command_line import merge_sources, read_plain

Values = dict[str, Any]
"""Settings of one run: dotted key → value."""

_KEY = re.compile(r"\w[\w-]*")
"""A part of a dotted key."""
_LONGEST = 120
"""Characters of a run's name; longer ones are cut and end in a hash."""


def read_sweep(text: str) -> list[Values]:
    """The runs of a sweep.

    Args:
        text: a grid `[target=[a,b],seed=[0,1]]`, or a YAML file that holds a grid (a mapping of
            keys to lists) or a list of runs (mappings of keys to values).

    Raises:
        ValueError: neither of these, no run, or a run that is there twice.
    """
    if text.startswith("["):
        runs = grid(_parse_grid(text))
    else:
        path = Path(text)
        if not path.is_file():
            raise ValueError(
                f"sweep={text!r} is neither a grid such as [seed=[0,1,2],target=[a,b]] nor a file"
            )
        runs = _from_file(path)
    if not runs:
        raise ValueError(f"sweep={text!r} has no run")
    seen: dict[str, Values] = {}
    for run in runs:
        key = json.dumps(run, sort_keys=True, default=str)
        if key in seen:
            raise ValueError(f"sweep={text!r} has the run {run} twice")
        seen[key] = run
    return runs


def grid(axes: Mapping[str, Any]) -> list[Values]:
    """Every combination of the axes' values; the last axis varies fastest."""
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"sweep axis {key!r} needs a list of values, as in {key}=[…]")
    if not axes:
        return []
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def names(runs: list[Values]) -> list[str]:
    """A directory name for each run: `target=e_form,seed=0`. The names depend on the run alone,
    so that a sweep can grow; they are all different."""
    found = [_name(run) for run in runs]
    if len({name.casefold() for name in found}) < len(found):
        found = [f"{_name(run)[: _LONGEST - 9]},{_hash(run)}" for run in runs]
    return found


def merge(base: Mapping[str, Any], run: Values) -> dict[str, Any]:
    """The base settings with a run's on top; dotted keys reach into sections."""
    merged = OmegaConf.create(dict(base))
    for key, value in run.items():
        OmegaConf.update(merged, key, value, merge=False)
    result = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(result, dict)
    refuse_references(result)
    return {str(k): v for k, v in result.items()}


def with_overrides(files: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """What the files and then the overrides say. One whose value is a mapping takes the place of
    what it names: `factors.task={…}` leaves none of the old tasks, `settings={}` no setting."""
    found = merge_sources(files)
    for override in overrides:
        given = merge_sources((), [override])
        path = override.partition("=")[0].strip().split(".")
        inner, above = given, found
        for part in path[:-1]:
            inner, above = inner.get(part, {}), above.get(part) or {}
            if not (isinstance(inner, dict) and isinstance(above, dict)):
                break
        else:
            if isinstance(inner.get(path[-1]), dict):
                above.pop(path[-1], None)
        found = _merged(found, given)
    return found


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; the second has the last word."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        deeper = isinstance(old, dict) and isinstance(value, dict)
        out[key] = _merged(old or {}, value) if deeper else value
    return out


def _parse_grid(text: str) -> dict[str, Any]:
    """`[a=[1,2],b.c=[x]]` → {"a": [1, 2], "b.c": ["x"]}."""
    if not text.endswith("]"):
        raise ValueError(f"sweep={text!r} has no closing bracket")
    axes: dict[str, Any] = {}
    for part in _split(text[1:-1]):
        key, equals, values = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"sweep axis {part!r} is not of the form key=[value,value]")
        if key in axes:
            raise ValueError(f"sweep axis {key!r} is there twice")
        try:
            axes[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"axis={values}"]))["axis"]  # type: ignore[index,call-overload]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"sweep axis {key!r}: {values!r} is no list: {reason}") from None
    return axes


def _split(text: str) -> list[str]:
    """Parts between the commas that no bracket or quote encloses."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"" and parts[-1].rstrip()[-1:] in ("", *"[{,:="):  # none within a word
            quote = c
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        if c == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [p for p in parts if p.strip()]


def _from_file(path: Path) -> list[Values]:
    value = read_plain(path, "sweep file")
    if isinstance(value, dict):
        return grid({str(k): v for k, v in value.items()})
    runs = []
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(item, dict):
            raise ValueError(f"sweep file {path}: entry {i + 1} is not a mapping of keys to values")
        runs.append(dict(dotted(item)))
    return runs


def dotted(value: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as (dotted key, value) pairs. Raises ValueError for what is no mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"settings are a mapping of keys to values, not {repr(value)[:40]}")
    pairs: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, dict) and item and all(map(_KEY.fullmatch, map(str, item))):
            pairs += dotted(item, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", item))
    return pairs


def _name(run: Values) -> str:
    text = ",".join(f"{file_part(key)}={file_part(_text(value))}" for key, value in run.items())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 9]},{_hash(run)}"


def _text(value: Any) -> str:
    """A value as a person would write it; of a path only what it ends with."""
    if isinstance(value, list):
        return "+".join(_text(v) for v in value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = str(value)
    return text.rstrip("/").rsplit("/", 1)[-1] if "/" in text else text


def _hash(run: Values) -> str:
    text = json.dumps(run, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
