"""Command lines and config files: YAML files, then `key=value` overrides, checked against a
dataclass."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crysforge.datapipe.storage.remote import DISK_FULL
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
    return configure(schema, merge_sources(files, overrides))


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
    except (ValueError, OSError, RuntimeError, MemoryError) as found:
        error = found if isinstance(found, ValueError | OSError) else _in_words(found)
        if error is None:
            raise
        if os.environ.get("CRYSFORGE_TRACEBACK"):
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in DISK_FULL and error.filename is None:
            error = OSError("the disk that the output is written to is full: free some space")
        print(f"error: {error}", file=sys.stderr, flush=True)
        again = isinstance(error, ConnectionError | ChildProcessError | TimeoutError)
        raise SystemExit(1 if again else 2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _in_words(error: Exception) -> Exception | None:
    """What to tell a user of a lost process, or of memory that does not suffice."""
    from crysforge.trainer.base.distributed import lost_process, place

    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        asked = re.search(r"tried to allocate (\d+) bytes", text)
        more = f" for {int(asked[1]) / 1e9:.3g} GB more" if asked else ""
        return ValueError(
            f"this machine has not enough memory{more}: lower the batch size, loader.max_atoms or "
            "the size of the model"
        )
    return lost_process(error, place(os.environ)[0])
