"""Label values as they stand in files: numbers, and words for what nobody measured."""

from __future__ import annotations

import math
import re
from typing import Any

from crysforge.datapipe.crystals.crystal import MAX_LABEL, BadCrystal

MISSING = frozenset(
    {
        "", ".", "..", "?", "*", "-", "--", "---", "–", "—", "na", "n/a", "n.a.", "n.a", "nan",
        "-nan", "none", "null", "nil", "nd", "n.d.", "no data", "not available", "not measured",
        "unknown", "undefined", "missing", "<na>", "#na", "#n/a", "#n/a n/a", "#value!", "#div/0!",
        "#ref!", "#num!", "#name?", "#null!", "-1.#ind", "1.#qnan",
    }
)  # fmt: skip
"""Texts, in lower case, that stand for a label nobody measured."""

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eEdD][+-]?\d+)?")
_COMMA = re.compile(r"[+−-]?\d*,\d+(?:[eE][+-]?\d+)?")
_GROUPS = re.compile(r"[+-]?\d{1,3}(?:[, '.]\d{3})+(?:[.,]\d+)?")
_WITH_UNIT = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*[^\W\d_].*|[^,]*%")


def parse_label(name: str, value: Any) -> float:
    """A label as a number; NaN where it is missing: None, NaN, or a word of `MISSING`.

    Raises:
        BadCrystal: other text, infinity, or a number beyond `MAX_LABEL`; says what to do.
    """
    if not is_labelled(value):
        return math.nan
    number = _number(value)
    if not math.isfinite(number):
        raise BadCrystal(
            f"label {name!r} is {str(value)[:40]!r}: {_remedy(value, name)}", "bad label"
        )
    if abs(number) > MAX_LABEL:
        raise BadCrystal(
            f"label {name!r} is {number:g}, beyond ±{MAX_LABEL:g}: give it in another unit",
            "bad label",
        )
    return number


def is_labelled(value: Any) -> bool:
    """Whether a raw label is there: not None, NaN, or a word for what is missing."""
    if isinstance(value, str):
        return value.strip().lower() not in MISSING
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def is_number(value: Any) -> bool:
    """Whether a cell of a table may be a label: a number, with a decimal comma too, or missing."""
    text = str(value).strip()
    return not is_labelled(text) or math.isfinite(_number(text)) or bool(_COMMA.fullmatch(text))


def may_be_thousands(value: str) -> bool:
    """Whether the comma in a number may stand for thousands, as in `1,234`."""
    return re.fullmatch(r"[+−-]?[1-9]\d{0,2},\d{3}", value.strip()) is not None


def has_comma(value: Any) -> bool:
    """Whether a label is written with a decimal comma."""
    return isinstance(value, str) and "," in value and bool(_COMMA.fullmatch(value.strip()))


def _number(value: Any) -> float:
    """NaN for what is none."""
    if isinstance(value, str):
        text = value.strip().replace("−", "-")
        if not _NUMBER.fullmatch(text):
            return math.nan
        return float(text.lower().replace("d", "e"))
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError):
        return math.nan


def _remedy(value: Any, name: str) -> str:
    text = str(value).strip()
    if _GROUPS.fullmatch(text):
        return "write the number without commas between its digits, as in 1234.5"
    if _COMMA.fullmatch(text):
        return (
            "it has a decimal comma; write a point, or put semicolons or tabs between the columns"
        )
    if _WITH_UNIT.fullmatch(text):
        return f"leave the unit out of the table and say it with units={{{name!r}: …}}"
    return "give a finite number, or leave it empty if it is unknown"
