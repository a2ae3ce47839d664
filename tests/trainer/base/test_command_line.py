"""Command lines: files and overrides merge in order; every mistake is named with its remedy."""

from __future__ import annotations

import dataclasses
import importlib
import io
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from crysforge.trainer.base.command_line import (
    from_sources,
    parse,
    read_yaml,
    run,
    to_yaml,
)
from crysforge.trainer.base.help import docstrings, help_text

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Inner:
    rate: float = 0.1
    steps: int | None = None
    """How many; null: all."""


@dataclass
class Outer:
    name: str = "x"
    """What it is called,
    in one word."""
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    parts: list[str] = field(default_factory=list)
    free: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False


def test_later_sources_win(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("name: a\ninner: {rate: 1, steps: 3}\nfree: {k: 1}\n")
    b.write_text("inner: {rate: 2}\n")
    argv = ["--config", str(a), f"--config={b}", "parts=[u,v]", "free.z=2", "--dry-run"]
    config = parse(Outer, None, [*argv, "--local_rank=1"])
    assert config == Outer("a", "a", Inner(2.0, 3), ["u", "v"], {"k": 1, "z": 2}, True)


def test_yaml_round_trip(tmp_path):
    config = Outer("n", "b", Inner(0.5, None), ["a"], {"deep": {"x": [1, 2]}})
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert from_sources(Outer, [str(path)]) == config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nmae=1"], ["'nmae'", "'name'"]),
        (["inner.rte=1"], ["'inner.rte'", "'rate'"]),
        (["inner.rate=fast"], ["'inner.rate'", "fast"]),
        (["name"], ["'name'", "key=value"]),
        (["--config", "no-such.yaml"], ["no-such.yaml", "does not exist"]),
        (["--config"], ["--config needs a file"]),
    ],
)
def test_mistakes_are_named(argv, words):
    with pytest.raises(ValueError) as error:
        parse(Outer, None, argv)
    assert all(w in str(error.value) for w in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch hacked']", "a: !!python/name:os.system", "[1]"],
)
def test_yaml_runs_no_code(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        read_yaml(path)
    assert not (tmp_path / "hacked").exists()


def test_help_lists_every_setting_with_its_docstring():
    text = help_text(Outer, "How to.")
    assert text.startswith("How to.")
    for line in (
        "  name = x   (text)\n      What it is called, in one word.\n",
        "  kind = a   (a | b)\n",
        "  inner.rate = 0.1   (number)\n",
        "  inner.steps = null   (whole number | null)\n      How many; null: all.",
        "  parts = []   (list of text)\n",
        "  dry_run = false   (true | false)\n",
    ):
        assert line in text, text


def test_a_reader_of_the_help_may_leave(tmp_path):
    code = "from crysforge.trainer.base.help import show; show('x\\n' * 10**6); print('on')"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "x\n0\n" and not done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["name=n", "inner.rate=3", "parts=[a]"],
        ["--name=n", "--inner.rate=3", "--parts=[a]"],
        ["--name", "n", "--inner.rate", "3", "--parts", "[a]"],
    ],
)
def test_keys_may_be_given_like_flags(argv):
    assert parse(Outer, None, argv) == Outer("n", "a", Inner(3.0), ["a"])
    assert parse(Outer, None, ["--dry_run", "--inner.steps", "-3"]).inner.steps == -3


def test_a_flag_without_a_value_is_named():
    for argv in (["--name"], ["--name", "--inner.rate=1"]):
        with pytest.raises(ValueError, match=r"'--name' has no value: give name=…"):
            parse(Outer, None, argv)
    with pytest.raises(ValueError, match="did you mean 'name'"):
        parse(Outer, None, ["--nmae", "x"])


def test_every_setting_of_every_command_has_a_docstring():
    missing = []
    for path in sorted((ROOT / "launch").glob("*.py")):
        module = importlib.import_module(f"crysforge.launch.{path.stem}")
        for name, cls in vars(module).items():
            if dataclasses.is_dataclass(cls) and name.endswith(("Config", "Job")):
                known, made = docstrings(cls), cls()
                missing += [
                    f"{name}.{f.name}"
                    for f in dataclasses.fields(cls)
                    if f.name not in known and not dataclasses.is_dataclass(getattr(made, f.name))
                ]
    assert not missing


def test_a_terminal_without_a_letter_ends_no_run(monkeypatch):
    bytes_ = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_, encoding="latin-1"))
    run(lambda: print("5 Å → …", flush=True))
    assert bytes_.getvalue() == "5 Å ".encode("latin-1") + b"\\u2192 \\u2026\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner=5", "'inner' is a section: give inner.NAME=…"),
        ("free=a", "'free' is a section: give free.NAME=…"),
        ("inner.rate.x=5", r"'inner\.rate' has no keys below it"),
        ("parts.x=5", "'parts' has no keys below it"),
    ],
)
def test_sections_and_values_are_told_apart(override, message):
    with pytest.raises(ValueError, match=message):
        from_sources(Outer, [], [override])
    assert from_sources(Outer, [], ["free.a.b=1"]).free == {"a": {"b": 1}}
