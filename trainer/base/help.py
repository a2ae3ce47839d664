"""What `--help` prints: every setting with its type, default and docstring, by section."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import sys
import textwrap
import types
import typing
from typing import Any

WIDTH = 96
"""Columns of the text."""


def show(text: str) -> None:
    """Prints, and is content with a reader that has seen enough (`--help | head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text(schema: type, doc: str | None) -> str:
    """Usage, then all settings: those of a section together, its own name before them."""
    lines = [(doc or "").strip(), "", "settings: KEY=VALUE, --KEY VALUE or --KEY=VALUE", ""]
    lines += _settings(schema(), "")
    return "\n".join(lines).rstrip()


def _settings(config: Any, prefix: str) -> list[str]:
    """The settings of a section, then its sections."""
    docs, hints = docstrings(type(config)), typing.get_type_hints(type(config))
    lines: list[str] = []
    sections: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            name = f"{prefix}{f.name}"
            about = docs.get(f.name) or _about(type(value))
            head = textwrap.wrap(f"{name}: {about}" if about else name, WIDTH)
            sections += [*head, *_settings(value, f"{name}.")]
            continue
        shown = "required" if value == "???" else _shown(value)
        lines.append(f"  {prefix}{f.name} = {shown}   ({_type(hints[f.name])})")
        if text := docs.get(f.name):
            lines += textwrap.wrap(_one_line(text), WIDTH, initial_indent=" " * 6,
                                   subsequent_indent=" " * 6)  # fmt: skip
    return [*lines, "", *sections]


def docstrings(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, those of its bases too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # made at run time, or not of Python
            continue
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for node, after in itertools.pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[node.target.id] = inspect.cleandoc(str(after.value.value))
    return found


def _about(cls: type) -> str:
    """What a section says of itself; the signature that dataclasses make up says nothing."""
    text = _one_line(cls.__doc__ or "")
    return "" if text.startswith(f"{cls.__name__}(") else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shown(value: Any) -> str:
    """A default as it would be typed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_shown, value))}]"
    return "''" if value == "" else str(value)


def _type(hint: Any) -> str:
    """The name of a type, with the choices where it is a choice."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if a is type(None) else _type(a) for a in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true | false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
