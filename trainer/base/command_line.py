"""Command lines and config files: YAML files, then `key=value` overrides, checked against a
dataclass.

What is typed on the command line is the user's own. A config file travels, so it is data: its
values are taken as they are (`${…}` is refused), and a URL or command in it is opened only if it is
typed. The config that a submitted job was given (`--recorded`) counts as typed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import crysforge
from crysforge.datapipe.common.checked import checked
from crysforge.datapipe.common.config import configure, refuse_references
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.common.safe_read import as_text, parse_yaml, read_named
from crysforge.datapipe.storage.remote import is_remote
from crysforge.trainer.base.help import help_text, show

T = TypeVar("T")

PROSE = ("license", "source", "title")
"""Settings that are shown, never opened; and so are all below `metadata`."""


def parse(schema: type[T], doc: str | None, argv: Sequence[str] | None = None) -> T:
    """The config a command line asks for.

    Args:
        schema: dataclass of all settings.
        doc: help text; printed with the settings and their defaults on `--help`.
        argv: `--config FILE` (repeatable, later files win), overrides `key=value`, `--key=value`
            or `--key value` with dots for nested keys, `--dry-run` for `dry_run=true`;
            `--recorded=SHA256`: the hash of a file that holds what was typed (launch/submit.py).
            Default: the process's arguments.

    Raises:
        ValueError: an unreadable file, a malformed argument, an unknown key or a wrong type; a URL
            or command that was not typed.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if "-h" in args or "--help" in args:
        show(help_text(schema, doc))
        raise SystemExit(0)
    recorded = [a.removeprefix(RECORDED) for a in args if a.startswith(RECORDED)]
    args = [a for a in args if not a.startswith(RECORDED)]
    return configure(schema, merge_sources(*split_arguments(args), recorded))


RECORDED = "--recorded="
"""Comes before the hash of a config file whose values count as typed."""


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, `key=value` overrides) of a command line; see `parse`."""
    args = list(argv)
    files: list[str] = []
    overrides: list[str] = []
    while args:
        arg = args.pop(0)
        if arg == "--config":
            if not args:
                raise ValueError("--config needs a file name")
            files.append(args.pop(0))
        elif arg.startswith("--config="):
            files.append(arg.removeprefix("--config="))
        elif arg in ("--dry-run", "--dry_run"):
            overrides.append("dry_run=true")
        elif arg.startswith("--local_rank"):  # the deepspeed launcher's own; LOCAL_RANK says it too
            if "=" not in arg and args:
                args.pop(0)
        elif arg.startswith("--") and "=" in arg:
            overrides.append(_key(arg.partition("=")[0]) + "=" + arg.partition("=")[2])
        elif arg.startswith("--") and args and not args[0].startswith("--"):
            overrides.append(f"{_key(arg)}={args.pop(0)}")
        elif arg.startswith("--"):
            raise ValueError(f"argument {arg!r} has no value: give {_key(arg)}=… (see --help)")
        elif "=" in arg and not arg.startswith("-"):
            overrides.append(arg)
        else:
            raise ValueError(f"argument {arg!r} is not of the form key=value (see --help)")
    return files, overrides


def _key(flag: str) -> str:
    """The key that a flag names: `trainer.max_steps` for `--trainer.max-steps`."""
    return flag.removeprefix("--").replace("-", "_")


def from_sources(schema: type[T], files: Sequence[str] = (), overrides: Sequence[str] = ()) -> T:
    """Merges YAML files and dotlist overrides, in that order, into `schema`."""
    return configure(schema, merge_sources(files, as_typed(schema, overrides)))


def merge_sources(
    files: Sequence[str] = (), overrides: Sequence[str] = (), recorded: Sequence[str] = ()
) -> dict[str, Any]:
    """What YAML files and dotlist overrides say, in that order, before any schema.

    Args:
        recorded: hashes of files whose values count as typed.

    Raises:
        ValueError: see `parse`.
    """
    merged: Any = OmegaConf.create({})
    typed: set[str] = set()
    for name in checked(list[str], list(files), "the list of config files"):
        path, data = _config(name)
        values = _mapping(path, data)
        own = {key for key, _ in leaves(values)}
        trusted = hashlib.sha256(data).hexdigest() in recorded
        typed = typed | own if trusted else typed - own
        merged = OmegaConf.merge(merged, values)
    try:
        given = OmegaConf.from_dotlist(list(overrides))
        typed |= {key for key, _ in leaves(OmegaConf.to_container(given))}
        found = OmegaConf.to_container(OmegaConf.merge(merged, given), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"overrides {list(overrides)}: {str(error).splitlines()[0]}") from None
    out = {str(k): v for k, v in found.items()}  # type: ignore[union-attr]
    refuse_references(out)
    refuse_locations(out, typed)
    return out


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested mappings, with their values: no mappings, but perhaps lists."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def refuse_locations(values: Mapping[str, Any], typed: Collection[str] = ()) -> None:
    """Raises ValueError for a URL or command to open among settings, but those of the `typed` keys
    and those that are shown only; and for a leave to replace files that is not typed."""
    for key, value in leaves(values):
        if key == "overwrite" and value and key not in typed:
            raise ValueError("overwrite=true counts only if it is typed on the command line")
        if key in typed or key.split(".")[-1] in PROSE or key.startswith("metadata."):
            continue
        for text in _texts(value):
            if is_remote(text):
                raise ValueError(
                    f"{key} is {text!r} in a config file: a URL or command is opened only if it is "
                    f"typed, so give {key}=… on the command line"
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def find_config(name: str | Path) -> Path:
    """The file of that name; else the config that is shipped under it, with or without `configs/`
    before and `.yaml` behind: `pretrain/tiny`."""
    path = Path(name)
    if path.is_absolute() or path.exists():
        return path
    inner = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    for place in crysforge.__path__:
        for suffix in ("", ".yaml"):
            shipped = Path(place, "configs", f"{inner}{suffix}")
            if shipped.is_file():
                return shipped
    return path


def shipped_configs() -> list[str]:
    """Names of the configs that are shipped: `pretrain/tiny`."""
    found = []
    for folder in (Path(place, "configs") for place in crysforge.__path__):
        found += [p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")]
    return sorted(found)


def as_typed(schema: type, overrides: Sequence[str]) -> list[str]:
    """Overrides in which names and other texts are what was typed, whatever they mean in YAML:
    `target=E: 1e5`, `targets=[E (eV/atom),007]`, `units.E_f (0.1 K)=eV`, `units={"a.b": eV}`.

    Raises:
        ValueError: a list or mapping of texts that cannot be told apart without quotes.
    """
    return [_as_typed(schema, override) for override in overrides]


def _as_typed(schema: type, override: str) -> str:
    key, equals, value = override.partition("=")
    place, path = schema, list[str]()
    options: tuple[Any, ...] = ()
    for name in key.split("."):
        path.append(name)
        options = _options(typing.get_type_hints(place).get(name))
        section = next((o for o in options if dataclasses.is_dataclass(o)), None)
        if section is None:
            break
        place = typing.cast(type, section)
    prefix = ".".join(path)
    below = next((typing.get_args(o)[1] for o in options if typing.get_origin(o) is dict), None)
    if prefix != key and below not in (None, Any):  # what is left of the key is one name
        name, _, value = override.removeprefix(f"{prefix}.").rpartition("=")
        return f"{prefix}={{{_quoted(name)}: {_text(value) if below is str else value}}}"
    if prefix != key or not equals:
        return override
    if str in options:
        return f"{key}={_text(value)}"
    if (list[str] in options and value[:1] == "[") or (below is str and value[:1] == "{"):
        return f"{key}={_flow(override, value)}"
    return override


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have."""
    either = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if either else (hint,)


def _text(value: str) -> str:
    """A typed text as YAML; what is in quotes, empty, null or a reference stays as it is."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if quoted or value in ("", "null", "~") or "${" in value or value[0] in "[{":
        return value
    return _quoted(value)


def _flow(override: str, value: str) -> str:
    """A typed list or mapping of texts as YAML in which they are quoted."""
    if "${" in value:
        return value
    try:
        found = as_written(yaml.compose(value, Loader=yaml.SafeLoader))
    except yaml.YAMLError:
        found = None
    texts = [*found, *found.values()] if isinstance(found, dict) else found
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{override}: cannot tell its parts apart; put names with any of , : # [ ] {{ }} in "
            'quotes, as in targets=["E: total, relaxed"]'
        )
    return _quoted(found)


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # which is YAML, too


def as_written(node: yaml.Node) -> Any:
    """A YAML value whose scalars are the texts that were written: `12:00:00`, `007`, `yes`."""
    if isinstance(node, yaml.MappingNode):
        return {str(as_written(k)): as_written(v) for k, v in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [as_written(v) for v in node.value]
    return typing.cast(yaml.ScalarNode, node).value


def read_yaml(name: str | Path) -> dict[str, Any]:
    """The settings in a config file that the user names, or in a shipped config (see
    `find_config`): plain values, taken as they are.

    Raises:
        ValueError: no such file, no mapping of settings, or one that refers to something elsewhere;
            see `datapipe.common.safe_read.parse_yaml`.
    """
    return _mapping(*_config(name))


def _config(name: str | Path) -> tuple[Path, bytes]:
    """A config file that the user names, or a shipped config, and what is in it."""
    path = find_config(name)
    if not path.exists():
        hint = nearest(str(name), shipped_configs())
        raise ValueError(f"config file {str(name)!r} does not exist; shipped: {hint}")
    return path, read_named(path, "config file")


def _mapping(path: str | Path, data: bytes) -> dict[str, Any]:
    where = f"config file {str(path)!r}"
    values = parse_yaml(as_text(data, where), where, aliases=True)
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{where} must hold a mapping of keys to values")
    refuse_references(values, f"{where}: ")
    return values


def read_plain(path: str | Path, what: str, as_written: bool = False) -> Any:
    """Whatever values a file that the user names holds, of which none is a URL or command or refers
    to anything.

    Args:
        what: the file is, for messages. as_written: see `datapipe.common.safe_read.parse_yaml`.

    Raises:
        ValueError: see `read_yaml`.
    """
    where = f"{what} {str(path)!r}"
    value = parse_yaml(as_text(read_named(path, what), where), where, as_written, aliases=True)
    refuse_references(value, f"{where}: ")
    refuse_locations(value if isinstance(value, dict) else {f"a setting of {where}": value})
    return value


def to_yaml(config: Any) -> str:
    """A dataclass config as YAML text that `parse` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def required(config: Any, *names: str) -> None:
    """Raises ValueError naming the first of `names` that the config leaves empty."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"setting {name!r} is required: give {name}=… (see --help)")
