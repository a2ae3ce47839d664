"""Stored values are read in one place: as data, of bounded size, where the path says."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from crysforge.datapipe.common.places import inside
from crysforge.datapipe.common.safe_read import (
    MAX_DEPTH,
    parse_json,
    parse_yaml,
    read_lines,
    read_mapping,
    read_text,
    to_yaml,
)

ROOT = Path(__file__).resolve().parents[3]
CODE = [p for d in ("datapipe", "models", "trainer", "launch") for p in (ROOT / d).rglob("*.py")]
NUMBERS = [
    "1e-3", "1e3", "-1E+5", "1.", "1_000.5", ".5", "1.5e3", ".inf", "-.inf", ".nan", "inf", "yes",
    "2024-01-01", "on", "~", "null", "1:30", "0o17", "017", "0x1f", "1e", "e5", "+1", "1_000",
    "'1e3'", "12345e67",
]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_those_of_config_files_so_far(text):
    expected = OmegaConf.to_container(OmegaConf.create(f"a: {text}"))["a"]
    assert repr(parse_yaml(f"a: {text}", "f")["a"]) == repr(expected)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=9)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(TEXTS | st.sampled_from(NUMBERS), VALUES | st.sampled_from(NUMBERS)))
def test_yaml_comes_back(values):
    assert parse_yaml(to_yaml(values), "f") == values


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode(errors="replace")))
def test_any_bytes_are_values_or_one_line(data):
    for parse in (parse_json, lambda d, w: parse_yaml(d.decode("latin-1"), w)):
        try:
            parse(data, "the file")
        except ValueError as error:
            assert str(error).startswith("the file ") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x 1\nb: *x", r"has an alias \(\*x\)"),
        ("a: !!python/name:os.system", "has a tag"),
        ("a: !!str 1", "has a tag"),
        ("a: 1\na: 2", "there twice"),
        ("[" * 40 + "]" * 40, "nested more than 32"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ("a: [", "is not valid YAML"),
        ("a: 1\n---\nb: 2", "is not valid YAML"),
        ("? [1, 2]\n: 3", "is not valid YAML"),
        ('a: "\\ud800"', "half a character|is not valid YAML"),
    ],
)
def test_yaml_of_a_stranger(text, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(error.value)


def test_aliases_of_the_user_stand_for_a_bounded_number_of_values():
    assert parse_yaml("a: &x [1]\nb: *x", "f", aliases=True) == {"a": [1], "b": [1]}
    lines = ["a0: &a0 [1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    for bomb in ("\n".join(lines), "a: &x [*x]", "a: &x {b: {c: *x}}"):
        with pytest.raises(ValueError, match="stands for more than"):
            parse_yaml(bomb, "f", aliases=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "is not valid JSON"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than"),
        ("9" * 5000, "is not valid JSON"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ("{} {}", "is not valid JSON"),
        ("\ufeff{}", "is not valid JSON"),
    ],
)
def test_json_of_a_stranger(text, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_json(text, "f.json")
    assert "\n" not in str(error.value)


def test_files_are_where_they_say_and_as_long(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.json"
    with pytest.raises(ValueError, match=r"a\.json does not exist"):
        read_mapping(path)
    (tmp_path / "secret.json").write_text('{"a": 1}')
    path.symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="is a link out of its directory"):
        read_mapping(path)
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(ValueError, match="does not exist"):
        read_mapping(path)
    path.unlink()
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a mapping of names"):
        read_mapping(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not text"):
        read_mapping(path)
    path.write_text(" " * 100)
    with pytest.raises(ValueError, match="has 100 bytes, such a file has at most 99"):
        read_text(path, 99)
    path.write_text('{"schema": 2}')
    with pytest.raises(ValueError, match="has schema 2, this version reads 1"):
        read_mapping(path, schema=1)


def test_lines_that_do_not_fit_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    assert not list(read_lines(path, dict))
    lines = ['{"n": 1}', "[]", "{", '{"n": "x"}', '{"n": 2, "o": 3}', "\xff", "[" * 9999, '{"n": 3']
    path.write_bytes("\n".join(lines).encode("latin-1"))
    assert list(read_lines(path, {"n": int})) == [(lines[0], {"n": 1}), (lines[4], {"n": 2})]
    path.write_bytes(b"x" * (3 << 20) + b'\n{"n": 4}\n')
    assert [line["n"] for _, line in read_lines(path, {"n": int})] == [4]


def test_paths_stay_inside(tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path)
    assert inside(root, "a") == root / "a"
    for name in ("..", "/etc", "a/../..", "out", "out/x"):
        with pytest.raises(ValueError, match="leads out of"):
            inside(root, name)


# Every place that reads values. What is here but not in the table is to go through safe_read.

READERS = ("json.", "yaml.", "omegaconf.OmegaConf.", "csv.", "ast.literal_eval", "tomllib.")
WRITERS = ("json.dump", "csv.writer", "csv.field")
KNOWN = {
    "datapipe/common/config.py": "settings onto a schema, after references are refused",
    "datapipe/common/safe_read.py": "what reads",
    "datapipe/common/tables.py": "what reads CSV files of ours",
    "datapipe/storage/record.py": "headers of records, all fields checked; loaders wait for it",
    "datapipe/crystals/structure_types.py": "a file of the installed pymatgen",
    "datapipe/sources/ase_files.py": "crystals: labels of a row",
    "datapipe/sources/delimited.py": "crystals: rows of a CSV",
    "datapipe/sources/gnome.py": "crystals: rows of a CSV",
    "datapipe/sources/json_stream.py": "crystals: JSON in a stream",
    "datapipe/sources/parse.py": "crystals: records and lists in text",
    "datapipe/sources/supercon3d.py": "crystals: rows of a CSV",
    "trainer/base/command_line.py": "settings and what is typed; files come from safe_read",
    "trainer/generation/request.py": "formulas that are asked for: rows of a CSV",
    "trainer/jobs/setup.py": "own values through JSON",
    "trainer/serving/generate.py": "own values through JSON",
    "launch/cluster/planning/sweep.py": "what is typed in sweep=[…], settings read safely",
}


def imported(tree: ast.AST) -> dict[str, str]:
    """What names of a module stand for: `loads` → `json.loads`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name): a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    return names


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Calls of a module by their full names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names, found = imported(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            found.append((names.get(first, first) + dot + rest, node))
    return found


def test_values_are_read_in_one_place():
    assert len(CODE) > 100
    found: dict[str, set[str]] = {}
    for path in CODE:
        for name, _ in calls(path):
            if name.startswith(READERS) and not name.startswith(WRITERS):
                found.setdefault(str(path.relative_to(ROOT)), set()).add(name)
    assert not {file: names for file, names in found.items() if file not in KNOWN}
    assert not KNOWN.keys() - found.keys()  # those that are gone


ANYTHING = {
    "datapipe/common/owners.py": "who has a lock, then checked by Process.from_json",
    "launch/cluster/status.py": "results.csv has whatever numbers runs have",
    "models/objectives/element_features.py": "a file of ours",
    "trainer/runs/card.py": "settings of a run, which the card shows",
    "trainer/runs/saved.py": "the state of a run, see Checkpoint.read_state",
    "trainer/judging/report.py": "what a report says of itself, kept beside the numbers",
    "trainer/evaluation/results.py": "settings of a run: `data`, if it is a text",
    "trainer/evaluation/suite.py": "settings of runs, to tell them apart",
    "trainer/runs/model_directory.py": "a model of one of two schemas, then checked; a scaler",
}


def test_what_is_read_has_a_form():
    found = set()
    for path in CODE:
        for name, call in calls(path):
            if name.endswith(("safe_read.read_mapping", "safe_read.read_lines")):
                form = call.args[1:2] or [k for k in call.keywords if k.arg == "form"]
                if not form:
                    found.add(str(path.relative_to(ROOT)))
    assert found == ANYTHING.keys()


def test_the_walk_sees_what_it_should(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "import yaml as y\nfrom json import loads as read\nfrom omegaconf import OmegaConf\n"
        "read('1')\ny.safe_load('1')\nOmegaConf.load('f')\n"
    )
    assert [name for name, _ in calls(path)] == [
        "json.loads", "yaml.safe_load", "omegaconf.OmegaConf.load",
    ]  # fmt: skip
