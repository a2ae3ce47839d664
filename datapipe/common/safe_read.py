"""Reading what a stranger may have written: nothing of it runs, nothing of it stands for something
elsewhere (a reference, the environment), and nothing is larger, deeper or elsewhere than it says.

Every file of ours that holds values is read here, as JSON or YAML by its name, and held against a
form of `common/checked.py`. `tests/datapipe/common/test_safe_read.py` walks the code for others.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from crysforge.datapipe.common.checked import checked
from crysforge.datapipe.common.places import own_file

MAX_TEXT = 1 << 20
"""Bytes of the longest file of values, unless its reader says otherwise."""
MAX_DEPTH = 32
"""Levels of the deepest one."""
MAX_VALUES = 100_000
"""Values that aliases may make of a file."""
_YAML = (".yaml", ".yml")


def read_named(path: str | Path, what: str = "file", limit: int = MAX_TEXT) -> bytes:
    """What a file holds that the user has named: a link is followed, and a pipe that a shell opened
    (`<(command)`) is read.

    Args:
        what: the file is, for messages.

    Raises:
        ValueError: it is missing, another pipe or a device, which might never end, or longer than
            `limit`.
    """
    try:
        if not os.path.isfile(path) and not _DESCRIPTOR.fullmatch(str(path)):
            os.stat(path)
            raise ValueError(f"{what} {str(path)!r} is no regular file")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise ValueError(f"{what} {str(path)!r} does not exist") from None
    except OSError as error:
        raise ValueError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise ValueError(f"{what} {str(path)!r} has more than {limit} bytes")
    return data


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """A small text file. Raises ValueError if it is missing, a link that leads elsewhere, longer
    than `limit` or no text."""
    try:
        with open(own_file(path), "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, such a file has at most {limit}")
    return as_text(data, str(path))


def as_text(data: bytes, where: str) -> str:
    """Bytes as text; ValueError names `where` they are from if they are none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text: {error}") from None


def read_mapping(
    path: Path, form: Any = dict, limit: int = MAX_TEXT, schema: int | None = None
) -> Any:
    """The mapping in a JSON or (by its name) YAML file, held against a form: plain values, taken as
    they are.

    Args:
        form: see `datapipe.common.checked`. limit: bytes of the longest file.
        schema: that the file must state, of those that the form has had.

    Raises:
        ValueError: as `read_text`, `parse_json`, `parse_yaml`; it holds no mapping of names to
            values, or not that of the form.
    """
    text = read_text(path, limit)
    values = parse_yaml(text, str(path)) if path.suffix in _YAML else parse_json(text, str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold a mapping of names to values")
    if schema is not None and values.get("schema") != schema:
        found = repr(values.get("schema"))[:40]
        raise ValueError(f"{path} has schema {found}, this version reads {schema}")
    return checked(form, values, str(path))


def read_lines(path: Path, form: Any, start: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file of JSON objects, each as text and as value, from byte `start` on; those
    that a kill cut off, and others that are not of the form, are left out; nothing if there is no
    file. Raises OSError if it cannot be read, ValueError for a link that leads elsewhere."""
    if not path.is_file():
        return
    with open(own_file(path), "rb") as file:
        file.seek(start)
        while line := file.readline(MAX_TEXT):
            try:
                text = as_text(line, str(path)).removesuffix("\n")
                value = checked(form, parse_json(text, str(path)), str(path))
            except ValueError:
                continue
            yield text, value


def parse_json(text: str | bytes, where: str) -> Any:
    """A JSON text as plain values.

    Raises:
        ValueError: it is none, it nests deeper than `MAX_DEPTH`, or it has numbers or characters
            that are none; names `where` it is from.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {_reason(error)}") from None
    _check(value, where)
    return value


def parse_yaml(text: str, where: str, as_written: bool = False, aliases: bool = False) -> Any:
    """A YAML text as plain values: mappings, lists, texts, numbers. Numbers are as in JSON (1e-3 is
    one), dates stay texts, nothing refers to anything.

    Args:
        as_written: makes every value but mappings and lists the text that stands there.
        aliases: whether a value may stand for an earlier one (`&name`, `*name`), as people write.

    Raises:
        ValueError: it is none; it has tags (which make objects), aliases (which may stand for
            billions of values), a key twice, or nests deeper than `MAX_DEPTH`; names `where` it is
            from.
    """
    try:
        _check_events(text, where, aliases)
        loader = (_Written if as_written else _Loader)(text)
        try:
            node = loader.get_single_node()
            if aliases:
                _check_size(node, where)
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(f"{where} is not valid YAML: {_reason(error)}") from None
    except ValueError as error:  # of a number that is none
        named = str(error).startswith(where)
        raise ValueError(str(error) if named else f"{where} is not valid YAML: {error}") from None
    _check(value, where)
    return value


def to_yaml(value: Mapping[str, Any]) -> str:
    """YAML that `parse_yaml` reads back as the same values."""
    plain = json.loads(json.dumps(value))  # no tuples, no object twice
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_events(text: str, where: str, aliases: bool) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) and not aliases:
            raise ValueError(f"{where} has an alias (*{event.anchor}): write the value out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{where} has a tag ({event.tag}): it may hold plain values only")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"{where} is nested more than {MAX_DEPTH} levels deep")


def _check_size(node: yaml.Node | None, where: str) -> None:
    """Raises ValueError if the aliases of a document stand for too many values, or for what they
    are in themselves."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # as long as it is being counted
            is_map = isinstance(node, yaml.MappingNode)
            below = [x for pair in node.value for x in pair] if is_map else node.value
            own = [] if isinstance(node, yaml.ScalarNode) else below
            sizes[id(node)] = 1 + sum(map(size, own))
        return sizes[id(node)]

    if node is not None and size(node) > MAX_VALUES:
        raise ValueError(f"{where} stands for more than {MAX_VALUES} values: write them out")


def _check(value: Any, where: str) -> None:
    """Raises ValueError for values that nest too deeply, or texts that no file can hold."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
                texts = list(item)
            else:
                texts = [item]
                below += item if isinstance(item, list) else ()
            for text in texts:
                if isinstance(text, str) and not text.isascii() and _SURROGATE.search(text):
                    raise ValueError(f"{where} has half a character (a lone surrogate)")
        level = below
    raise ValueError(f"{where} is nested more than {MAX_DEPTH} levels deep")


_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/\d+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*(?:[eE][-+]?\d+)?)$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_TAG = "tag:yaml.org,2002:"


class _NoKeyTwice(yaml.constructor.BaseConstructor):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


class _Loader(_NoKeyTwice, yaml.SafeLoader):
    """Plain values."""


class _Written(_NoKeyTwice, yaml.BaseLoader):
    """Texts."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [
            (tag, rule) for tag, rule in rules if tag not in (_TAG + "float", _TAG + "timestamp")
        ]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))
