"""What a stored value must be: a type with rules, or a table of fields, and the check against it.

    RUN = {"schema": Literal[1], "finished": list[StageName], "rewound?": StageName | None}
    run = checked(RUN, value, "runs/a/run.json")

| form | holds |
|---|---|
| `bool`, `int`, `float`, `str`, `None`, `Literal[…]`, unions | that, exactly: 1 is no bool, true is
  no number |
| `Annotated[type, rule, …]` | that, and every rule |
| `list[type]`, `dict[type, type]`; of tables `[form]`, `mapped(type, form)` | that of each entry |
| `{"name": form, "name?": form, "*": form}` | these fields, those with `?` perhaps, and what is
  there besides under `*`; without `*`, other fields are left out |
| `either(form, …)` | one of several, where one of them is a table |
| a dataclass | these fields and no others; the value becomes one of it |
| `Any` | anything that JSON or YAML may hold |
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from crysforge.datapipe.common.escape import brief

LARGEST = 2**62
"""No number of ours is larger: counts, bytes, steps, seconds."""


@dataclass(frozen=True)
class Rule:
    """What a value must be beyond its type."""

    what: str
    """As it stands in an error: "a name"."""
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Either:
    """Several forms, of which a value has one."""

    forms: tuple[Any, ...]


@dataclass(frozen=True)
class mapped:
    """A mapping, as `dict[key, value]` where the values are no types but tables."""

    key: Any
    value: Any


def table_of(cls: Any) -> dict[str, Any]:
    """The fields of a dataclass as a table, for values that stay mappings."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def either(*forms: Any) -> Either:
    """One of several forms."""
    return Either(forms)


def matching(pattern: str, what: str) -> Rule:
    """A text that a regular expression matches as a whole."""
    return Rule(what, lambda text: re.fullmatch(pattern, text) is not None)


def between(low: float, high: float) -> Rule:
    """A number within a range, both ends included."""
    return Rule(f"from {low:g} to {high:g}", lambda value: low <= value <= high)


def sized(low: int, high: int) -> Rule:
    """A text, list or mapping of so many parts."""
    return Rule(f"of {low} to {high} parts", lambda value: low <= len(value) <= high)


def _line(text: str) -> bool:
    return len(text) <= 500 and _printable(text)


@functools.lru_cache(4096)
def _printable(text: str) -> bool:
    return text.replace("\xa0", " ").isprintable()


def _inside(text: str) -> bool:
    """Whether a relative path leads nowhere but down."""
    parts = text.split("/")
    return _line(text) and not text.startswith("/") and ".." not in parts


LINE = Rule("one line of at most 500 characters", _line)
Line = Annotated[str, LINE]
"""A text that stays on its line, wherever it is shown."""
Name = Annotated[str, LINE, sized(1, 500)]
Part = Annotated[
    str, LINE, Rule("a file's name", lambda t: t not in ("", ".", "..") and "/" not in t)
]
"""A name that is one part of a path."""
Inside = Annotated[str, sized(1, 500), Rule("a path that stays inside", _inside)]
Hash = Annotated[str, matching("[0-9a-f]{64}", "a SHA-256 in hexadecimal digits")]
Count = Annotated[int, between(0, LARGEST)]
Finite = Annotated[float, Rule("finite", math.isfinite)]
Seconds = Annotated[float, between(0, LARGEST)]
Split = Annotated[str, matching("train|val|test", "train, val or test")]
Number = Annotated[int, between(1, 118)]
"""An atomic number."""


class Misfit(ValueError):
    """A value that is not of its form.

    Attributes:
        at: where it is.
    """

    def __init__(self, text: str, at: str) -> None:
        super().__init__(text)
        self.at = at


def checked(form: Any, value: Any, where: str, at: str = "") -> Any:
    """The value, held against a form.

    Args:
        where: what holds the value, for the message: a file. at: where in it.

    Raises:
        ValueError: it is of another type, out of its range or pattern, or lacks a field; one line
            that names the field and what was found.
    """
    if form is type(value) and form in (bool, float, str):  # most are: logs are long
        return value
    if isinstance(form, Mapping):
        return _table(form, value, where, at)
    if isinstance(form, list):
        return _list(form[0], value, where, at)
    if isinstance(form, mapped):
        if not isinstance(value, Mapping):
            raise _wrong("a mapping", value, where, at)
        return _mapping((form.key, form.value), value, where, at)
    if dataclasses.is_dataclass(form) and isinstance(form, type):
        return _instance(form, value, where, at)
    if form is Any:
        return value
    origin, args = typing.get_origin(form), typing.get_args(form)
    if origin is Annotated:
        value = checked(args[0], value, where, at)
        for rule in args[1:]:
            if not rule.test(value):
                raise _wrong(_both(args[0], rule), value, where, at)
        return value
    if isinstance(form, Either) or origin in (Union, types.UnionType):
        return _one_of(form.forms if isinstance(form, Either) else args, value, where, at)
    if origin is Literal:
        same = any(value == choice and type(value) is type(choice) for choice in args)
    elif origin is list or form is list:
        return _list(args[0] if args else Any, value, where, at)
    elif origin is dict or form is dict:
        if isinstance(value, Mapping):
            return _mapping(args or (str, Any), value, where, at)
        same = False
    else:
        same = _is(form, value)
    if not same:
        raise _wrong(described(form), value, where, at)
    return value


def _list(form: Any, value: Any, where: str, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong("a list", value, where, at)
    return [checked(form, x, where, f"{at}[{i}]") for i, x in enumerate(value)]


def _is(form: Any, value: Any) -> bool:
    """Whether a value is of a plain type; numbers beyond all bounds are of none."""
    if form in (None, types.NoneType):
        return value is None
    if form is float and isinstance(value, float):
        return True
    if form in (int, float):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    assert form in (bool, str), f"{form!r} is no form"
    return isinstance(value, form)


def _one_of(forms: tuple[Any, ...], value: Any, where: str, at: str) -> Any:
    rest = [f for f in forms if f not in (None, types.NoneType)]
    if value is None and len(rest) < len(forms):
        return None
    if len(rest) == 1:
        return checked(rest[0], value, where, at)
    found: list[Misfit] = []
    for form in rest:
        try:
            return checked(form, value, where, at)
        except Misfit as error:
            found.append(error)
    deepest = max(found, key=lambda error: error.at.count("."))
    if deepest.at != at:
        raise deepest
    raise _wrong(" or ".join(map(described, forms)), value, where, at)


def _table(form: Mapping[str, Any], value: Any, where: str, at: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong("a mapping", value, where, at)
    out: dict[str, Any] = {}
    for key, inner in form.items():
        name = key.removesuffix("?")
        place = f"{at}.{name}" if at else name
        if name in value and key != "*":
            out[name] = checked(inner, value[name], where, place)
        elif key == name and key != "*":
            raise Misfit(f"{where} is damaged: missing key {brief(place)}", at)
    if "*" in form:
        rest = {k: v for k, v in value.items() if k not in out}
        out |= _mapping((Name, form["*"]), rest, where, at)
    return out


def _mapping(forms: tuple[Any, ...], value: Mapping[Any, Any], where: str, at: str) -> dict:
    out, place = {}, f"a key of {at or 'the mapping'}"
    for key, item in value.items():
        name = checked(forms[0], key, where, place)
        out[name] = checked(forms[1], item, where, f"{at}.{key}" if at else str(key))
    return out


def _instance(cls: Any, value: Any, where: str, at: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong("a mapping", value, where, at)
    hints = typing.get_type_hints(cls, include_extras=True)
    needed = {
        f.name: f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        for f in dataclasses.fields(cls)
    }
    for key in (*needed, *value):
        place = f"{at}.{key}" if at else str(key)
        if key not in needed:
            raise Misfit(f"{where} is damaged: unknown key {brief(place)}", at)
        if key not in value and needed[key]:
            raise Misfit(f"{where} is damaged: missing key {brief(place)}", at)
    given = {
        k: checked(hints[k], v, where, f"{at}.{k}" if at else str(k)) for k, v in value.items()
    }
    try:
        return cls(**given)
    except ValueError as error:
        raise Misfit(f"{where} is damaged: {f'{at}: ' if at else ''}{error}", at) from None


def _wrong(what: str, value: Any, where: str, at: str) -> Misfit:
    return Misfit(
        f"{where} is damaged: {brief(at, bare=True) or 'it'} must be {what}, not {brief(value)}", at
    )


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    **dict.fromkeys((None, types.NoneType), "nothing"),
}


def described(form: Any) -> str:
    """A form in words."""
    if isinstance(form, list):
        return _WORDS[list]
    origin, args = typing.get_origin(form), typing.get_args(form)
    if origin is Annotated:
        return _both(args[0], args[-1])
    if origin is Literal:
        return " or ".join(map(repr, args))
    if isinstance(form, Either) or origin in (Union, types.UnionType):
        return " or ".join(map(described, form.forms if isinstance(form, Either) else args))
    if isinstance(form, mapped | Mapping):
        return _WORDS[dict]
    return _WORDS.get(origin or form, _WORDS[dict])


def _both(form: Any, rule: Rule) -> str:
    """A form with a rule in words."""
    alone = rule.what.split()[0] in ("a", "an", "one", "the")
    return rule.what if alone else f"{described(form)}, {rule.what}"
