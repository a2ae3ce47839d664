"""Command lines and config files: YAML files, then `key=value` overrides, checked against a
dataclass."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crysforge.models.registry import configure

T = TypeVar("T")


def parse(schema: type[T], doc: str | None, argv: Sequence[str] | None = None) -> T:
    """The config a command line asks for.

    Args:
        schema: dataclass of all settings.
        doc: help text; printed with the settings and their defaults on `--help`.
        argv: `--config FILE` (repeatable, later files win), `key=value` overrides with dots for
            nested keys, `--dry-run` for `dry_run=true`. Default: the process's arguments.

    Raises:
        ValueError: an unreadable file, a malformed argument, an unknown key or a wrong type.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if "-h" in args or "--help" in args:
        print(help_text(schema, doc))
        raise SystemExit(0)
    return from_sources(schema, *split_arguments(args))


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
        elif "=" in arg and not arg.startswith("-"):
            overrides.append(arg)
        else:
            raise ValueError(f"argument {arg!r} is not of the form key=value (see --help)")
    return files, overrides


def from_sources(schema: type[T], files: Sequence[str] = (), overrides: Sequence[str] = ()) -> T:
    """Merges YAML files and dotlist overrides, in that order, into `schema`."""
    return configure(schema, merge_sources(files, as_typed(schema, overrides)))


def merge_sources(files: Sequence[str] = (), overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What YAML files and dotlist overrides say, in that order, before any schema."""
    merged: Any = OmegaConf.create({})
    for name in files:
        merged = OmegaConf.merge(merged, read_yaml(name))
    try:
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"overrides {list(overrides)}: {str(error).splitlines()[0]}") from None
    return {str(k): v for k, v in values.items()}  # type: ignore[union-attr]


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


def read_yaml(path: str | Path) -> DictConfig:
    """A YAML mapping from a file; runs no code whatever the file holds."""
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise ValueError(f"config file {str(path)!r} does not exist") from None
    except OSError as error:
        raise ValueError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config file {str(path)!r} is not valid YAML: {reason}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"config file {str(path)!r} must hold a mapping of keys to values")
    return config


def to_yaml(config: Any) -> str:
    """A dataclass config as YAML text that `parse` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def help_text(schema: type, doc: str | None) -> str:
    """Usage and every setting with its default, one a line."""
    lines = [(doc or "").strip(), "", "settings (key = default):"]

    def walk(value: Any, prefix: str) -> None:
        for f in dataclasses.fields(value):
            default = getattr(value, f.name)
            if dataclasses.is_dataclass(default):
                walk(default, f"{prefix}{f.name}.")
            else:
                shown = "(required)" if default == "???" else default
                lines.append(f"  {prefix}{f.name} = {shown}")

    walk(schema(), "")
    return "\n".join(lines)


def required(config: Any, *names: str) -> None:
    """Raises ValueError naming the first of `names` that the config leaves empty."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"setting {name!r} is required: give {name}=… (see --help)")


def run(main: Callable[[], Any]) -> None:
    """Runs a launch script: a user's error is one line on stderr and exit code 2; a connection or
    process that was lost, which the same command may find again, is one with exit code 1.

    `CRYSFORGE_TRACEBACK=1` shows the traceback as well.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without Å must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError, RuntimeError) as found:
        error = _lost(found) if isinstance(found, RuntimeError) else found
        if error is None:
            raise
        if os.environ.get("CRYSFORGE_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        again = isinstance(error, ConnectionError | ChildProcessError | TimeoutError)
        raise SystemExit(1 if again else 2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _lost(error: RuntimeError) -> OSError | None:
    from crysforge.trainer.base.distributed import lost_process, place

    return lost_process(error, place(os.environ)[0])
