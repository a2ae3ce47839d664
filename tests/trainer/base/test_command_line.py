"""Command lines: files and overrides merge in order; every mistake is named with its remedy."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.common.files import sha256
from crysforge.datapipe.storage.remote import is_below
from crysforge.launch.predict import PredictConfig
from crysforge.trainer.base.command_line import from_sources, parse, read_yaml, to_yaml
from crysforge.trainer.base.help import docstrings, help_text
from crysforge.trainer.base.script import run

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


def test_an_error_steers_no_terminal(capsys):
    def fail():
        raise ValueError("crystal \x1b[2J\u202ea\nb")

    with pytest.raises(SystemExit):
        run(fail)
    assert capsys.readouterr().err == "error: crystal \\u001b[2J\\u202ea\nb\n"


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


# --- what travels in a file, and what is typed ---------------------------------------------------


@dataclass
class Job:
    data: str = ""
    title: str = ""
    parts: list[str] = field(default_factory=list)
    free: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


PLACES = ["pipe:touch x", "http://h/x", "s3://b/x", "simplecache::http://h"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("key", ["data", "parts", "free.a.b"])
def test_a_place_elsewhere_is_opened_if_it_is_typed(key, place, tmp_path):
    """In a config file it is refused, whatever the setting; what the user types is his own."""
    path = tmp_path / "c.yaml"
    value = [place] if key == "parts" else place
    nested = {"free": {"a": {"b": place}}} if "." in key else {key: value}
    path.write_text(json.dumps(nested))
    words = rf"{key} is .* in a config file: .* only if it is typed, so give {key}=…"
    with pytest.raises(ValueError, match=words) as error:
        parse(Job, None, ["--config", str(path)])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=words):  # another setting is none of its business
        parse(Job, None, ["--config", str(path), "title=pipe:x"])
    typed = parse(Job, None, ["--config", str(path), f"{key}={json.dumps(value)}"])
    assert place in json.dumps(vars(typed))


def test_a_later_file_takes_no_more_than_an_earlier_one(tmp_path):
    typed, other = tmp_path / "typed.yaml", tmp_path / "other.yaml"
    typed.write_text("data: s3://mine\n")
    other.write_text("data: s3://theirs\n")
    recorded = f"--recorded={sha256(typed)}"
    assert parse(Job, None, [f"--config={typed}", recorded]).data == "s3://mine"
    for files in ([typed, other], [other], [other, typed]):
        argv = [*(f"--config={file}" for file in files), recorded]
        if files[-1] is typed:
            assert parse(Job, None, argv).data == "s3://mine"
            continue
        with pytest.raises(ValueError, match=r"s3://theirs.*only if it is typed"):
            parse(Job, None, argv)
    typed.write_text("data: s3://mine\nseed: 1\n")  # edited since
    with pytest.raises(ValueError, match="only if it is typed"):
        parse(Job, None, [f"--config={typed}", recorded])


def test_a_file_gives_no_leave_to_replace_files(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("overwrite: true\n")
    with pytest.raises(ValueError, match="overwrite=true counts only if it is typed"):
        parse(PredictConfig, None, [f"--config={path}"])
    assert parse(PredictConfig, None, [f"--config={path}", "overwrite=true"]).overwrite
    path.write_text("overwrite: false\n")
    assert not parse(PredictConfig, None, [f"--config={path}"]).overwrite


def test_what_is_shown_may_be_an_address(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("title: see https://doi.org/x\nfree: {source: 'from http://h, a: b'}\n")
    assert parse(Job, None, [f"--config={path}"]).title == "see https://doi.org/x"


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", "a/${seed}", "${oc.decode:${oc.env:HOME}}", "\\${a}", "${"]
)
def test_a_file_refers_to_nothing(text, tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    for document in ({"data": text}, {"parts": ["a", text]}, {"free": {"a": {"b": text}}},
                     {"free": {text: 1}}):  # fmt: skip
        path.write_text(json.dumps(document))
        with pytest.raises(ValueError, match=r"c\.yaml'?: .* refers to values elsewhere") as error:
            parse(Job, None, [f"--config={path}"])
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="refers to values elsewhere"):
            configure(Job, document)


def test_what_is_typed_may_refer(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "s3://bucket")
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\n")
    argv = [f"--config={path}", "data='${oc.env:PLACE}/mp20'", "title=seed ${seed}"]
    found = parse(Job, None, argv)
    assert (found.data, found.title) == ("s3://bucket/mp20", "seed 3")


def test_a_file_may_name_a_value_and_come_from_a_shell(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("parts: &p [a, b]\nfree: {again: *p}\n")
    assert parse(Job, None, [f"--config={path}"]).free == {"again": ["a", "b"]}
    reading, writing = os.pipe()
    os.write(writing, b"seed: 7\n")
    os.close(writing)
    assert parse(Job, None, [f"--config=/dev/fd/{reading}"]).seed == 7  # <(command)
    os.close(reading)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="is no regular file"):
        parse(Job, None, [f"--config={tmp_path / 'fifo'}"])


@pytest.mark.parametrize(
    ("url", "root", "below"),
    [
        ("s3://b/mp20", "s3://b", True),
        ("s3://b/mp20/", "s3://b/", True),
        ("s3://b", "s3://b", True),
        ("http://h/a/b-1_2.x", "http://h/a", True),
        ("s3://bucket2/x", "s3://b", False),
        ("s3://b/../c", "s3://b", False),
        ("s3://b/a/./c", "s3://b", False),
        ("http://h@evil/x", "http://h", False),
        ("http://h.evil/x", "http://h", False),
        ("http://h/a%2f..%2fb", "http://h/a", False),
        ("http://h/a?x=http://evil", "http://h", False),
        ("http://h/{}", "http://h", False),
        ("simplecache::s3://b/x", "s3://b", False),
        ("pipe:cat a", "pipe:cat", False),
        ("pipe:cat/a", "pipe:cat", False),
        ("/local/a", "s3://b", False),
        ("s3://b/a", "", False),
    ],
)
def test_what_is_below_an_address(url, root, below):
    assert is_below(url, root) is below
