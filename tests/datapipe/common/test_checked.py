"""Forms of stored values: what is of them passes unchanged, all else is one line that names the
field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crysforge.datapipe.common.checked import (
    Count,
    Finite,
    Hash,
    Inside,
    Line,
    Name,
    Part,
    between,
    checked,
    either,
    mapped,
    sized,
    table_of,
)


@dataclass(frozen=True)
class Point:
    x: Finite
    name: Name = "a"

    def __post_init__(self) -> None:
        if self.x > 9:
            raise ValueError("too far")


TABLE = {"n": Count, "text?": Line | None, "points?": [table_of(Point)], "*": float}
NESTED: dict[str, Any] = {"n": Count}
NESTED["below?"] = either(NESTED, None)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        (bool, True), (int, -3), (float, 1), (float, float("nan")), (str, ""), (None, None),
        (int | None, None), (Literal["a", 1], 1), (list[int], []), (dict[str, int], {"a": 1}),
        (Annotated[list[int], sized(1, 2)], [1]), (Annotated[int, between(1, 3)], 3),
        (Hash, "0" * 64), (Name, "Å a"), (Part, "a b"), (Inside, "a/b.c"), (Any, object),
        (TABLE, {"n": 1, "loss": 0.5}), (TABLE, {"n": 0, "text": None}),
        (TABLE, {"n": 0, "points": [{"x": 1, "name": "b"}]}),
        (mapped(Name, TABLE), {"a": {"n": 1}}), (either(TABLE, None), None),
        (NESTED, {"n": 1, "below": {"n": 2, "below": None}}),
    ],
)  # fmt: skip
def test_what_is_of_a_form_passes_as_it_is(form, value):
    found = checked(form, value, "f")
    assert found == value or found != found
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("form", "value", "words"),
    [
        (int, True, "it must be a whole number, not True"),
        (bool, 1, "true or false, not 1"),
        (int, 1.0, "a whole number, not 1.0"),
        (int, 2**80, "beyond all bounds"),
        (float, 10**400, "beyond all bounds"),
        (float, "1", "a number, not '1'"),
        (str, None, "a text, not None"),
        (None, 0, "nothing, not 0"),
        (int | None, "a", "a whole number, not 'a'"),
        (int | str, [], "a whole number or a text, not a list of 0"),
        (Literal[1], True, "1, not True"),
        (Literal["a", "b"], "c", "'a' or 'b', not 'c'"),
        (list[int], {}, "a list, not a mapping of 0"),
        (list[int], [1, "x"], r"\[1\] must be a whole number"),
        (dict[str, int], [], "a mapping, not a list"),
        (dict[str, int], {1: 1}, "a key of the mapping must be a text, not 1"),
        (dict[str, int], {"a": "b"}, "a must be a whole number"),
        (Annotated[list[int], sized(1, 2)], [], "of 1 to 2 parts"),
        (Annotated[float, between(0, 1)], float("nan"), "from 0 to 1, not nan"),
        (Finite, float("inf"), "finite, not inf"),
        (Count, -1, "from 0 to"),
        (Hash, "0" * 63, "a SHA-256"),
        (Hash, "0" * 64 + "\n", "a SHA-256"),
        (Name, "", "of 1 to 500 parts"),
        (Line, "a\nb", "one line"),
        (Line, "a\x1b[2J", "one line"),
        (Line, "\u202ea", "one line"),
        (Line, "a" * 501, "one line"),
        (Part, "..", "a file's name"),
        (Part, "a/b", "a file's name"),
        (Inside, "/etc", "a path that stays inside"),
        (Inside, "a/../../b", "a path that stays inside"),
        (TABLE, 3, "it must be a mapping, not 3"),
        (TABLE, {}, "missing key 'n'"),
        (TABLE, {"n": 1, "loss": "x"}, "loss must be a number"),
        (TABLE, {"n": 1, "points": [{"x": 1}]}, r"missing key 'points\[0\].name'"),
        (Point, {"x": 1, "y": 2}, "unknown key 'y'"),
        (Point, {"name": "a"}, "missing key 'x'"),
        (Point, {"x": 10}, "too far"),
        (NESTED, {"n": 1, "below": {"n": 2, "below": {}}}, "missing key 'below.below.n'"),
    ],
)
def test_what_is_not_is_one_line(form, value, words):
    with pytest.raises(ValueError, match=words) as caught:
        checked(form, value, "a/file.json")
    text = str(caught.value)
    assert text.startswith("a/file.json is damaged: ") and text.isprintable() and len(text) < 300


def test_other_fields_are_left_out_and_dataclasses_made():
    assert checked({"a": int}, {"a": 1, "b": [2]}, "f") == {"a": 1}
    assert checked(dict[str, Point], {"p": {"x": 2}}, "f") == {"p": Point(2)}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_any_value_passes_or_is_one_line(value):
    for form in (TABLE, NESTED, Point, Name, Count, list[Point], mapped(Name, TABLE)):
        try:
            checked(form, value, "f")
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 300
