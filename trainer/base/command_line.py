"""Command lines and config files: YAML files, then `key=value` overrides, checked against a
dataclass."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import crysforge
from crysforge.datapipe.common.config import configure
from crysforge.datapipe.common.names import nearest
from crysforge.trainer.base.help import help_text, show

T = TypeVar("T")


def parse(schema: type[T], doc: str | None, argv: Sequence[str] | None = None) -> T:
    """The config a command line asks for.

    Args:
        schema: dataclass of all settings.
        doc: help text; printed with the settings and their defaults on `--help`.
        argv: `--config FILE` (repeatable, later files win), overrides `key=value`, `--key=value`
            or `--key value` with dots for nested keys, `--dry-run` for `dry_run=true`. Default: the
            process's arguments.

    Raises:
        ValueError: an unreadable file, a malformed argument, an unknown key or a wrong type.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if "-h" in args or "--help" in args:
        show(help_text(schema, doc))
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


def read_yaml(name: str | Path) -> DictConfig:
    """A YAML mapping from a file, or from a shipped config (see `find_config`); runs no code
    whatever the file holds."""
    path = find_config(name)
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        hint = nearest(str(name), shipped_configs())
        raise ValueError(f"config file {str(name)!r} does not exist; shipped: {hint}") from None
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


def required(config: Any, *names: str) -> None:
    """Raises ValueError naming the first of `names` that the config leaves empty."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"setting {name!r} is required: give {name}=… (see --help)")


def run(
    main: Callable[[], Any], ended: Callable[[Exception | None, int], None] = lambda *_: None
) -> None:
    """Runs a launch script: a user's error is one line on stderr and exit code 2; a connection or
    process that was lost, which the same command may find again, is one with exit code 1.

    `CRYSFORGE_TRACEBACK=1` shows the traceback as well.

    Args:
        ended: gets the error that ends the process, or None, and the exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without Å must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as found:
        error = _lost(found) if isinstance(found, RuntimeError) else found
        if not isinstance(error, ValueError | OSError):
            ended(found, 1)
            raise
        if os.environ.get("CRYSFORGE_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        again = isinstance(error, ConnectionError | ChildProcessError | TimeoutError)
        ended(error, 1 if again else 2)
        raise SystemExit(1 if again else 2) from None
    finally:
        ended(None, 0)


def _lost(error: RuntimeError) -> Exception | None:
    from crysforge.trainer.base.distributed import lost_process, place

    return lost_process(error, place(os.environ)[0])
