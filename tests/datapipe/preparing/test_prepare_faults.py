"""`prepare`: mistakes are one clear line, and whatever ends it leaves nothing half-written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.preparing import write as writing
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.preparing.write import plan
from crysforge.datapipe.storage.manifest import Manifest
from tests.tables import config, contents, leftovers, rows, write

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "launch" / "prepare.py"


def _flattened(text: str) -> str:
    """A CIF with another length a, and without the volume that it contradicts."""
    return text.replace("length_a   4", "length_a   0").replace("_cell_volume", "_other_volume")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t[2].__setitem__(1, "nonsense"), r"all\.csv row 3 \(id 'mp-2'\): .*neither"),
        (lambda t, c: t[2].__setitem__(2, "inf"), r"row 3 \(id 'mp-2'\): label 'gap' is 'inf'"),
        (lambda t, c: t[2].__setitem__(0, "mp-1"), r"1 ids occur more than once: mp-1"),
        (
            lambda t, c: t[2].__setitem__(1, _flattened(c[2])),
            r"row 3 \(id 'mp-2'\): .*Å apart",
        ),
    ],
    ids=["unreadable", "label", "duplicate", "close"],
)  # fmt: skip
def test_on_bad_error_stops_and_leaves_nothing(tmp_path, cifs, change, words):
    table = rows(cifs, 10)
    change(table, cifs)
    source = write(tmp_path / "all.csv", table)
    with pytest.raises(ValueError, match=words):
        prepare(config(input=source, output=str(tmp_path / "out"), on_bad="error"))
    assert leftovers(tmp_path) == ["all.csv"]
    assert prepare(config(input=source, output=str(tmp_path / "out"))).provenance["kept"] == 9


def test_all_dropped_is_an_error(tmp_path, source):
    filters = Filters(allow=["Na"])
    with pytest.raises(ValueError, match=r"all 40 crystals were dropped \(40 element not wanted\)"):
        prepare(config(input=source, output=str(tmp_path / "out"), filters=filters))
    assert leftovers(tmp_path) == ["all.csv"]


def test_unknown_target_names_the_nearest(tmp_path, source):
    words = r"no target 'gpa': did you mean 'gap'\? valid: gap; .*labels=TABLE"
    with pytest.raises(ValueError, match=words):
        prepare(config(input=source, output=str(tmp_path / "out"), targets=["gpa"]))
    filters = Filters(labels={"ehull": [0, 1]})
    with pytest.raises(ValueError, match="no target 'ehull'"):
        prepare(config(input=source, output=str(tmp_path / "out"), filters=filters))
    assert leftovers(tmp_path) == ["all.csv"]


def test_used_output_is_refused_and_untouched(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="out already holds files"):
        prepare(config(input=source, output=str(out)))
    assert leftovers(out) == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    prepare(config(input=source, output=str(out)))
    before = contents(out)
    with pytest.raises(ValueError, match="out already holds a data set"):
        prepare(config(input=source, output=str(out), shard_size=3))
    assert contents(out) == before and leftovers(tmp_path) == ["all.csv", "out"]


@pytest.mark.parametrize("output", ["in", "in/out", "in/a/../b/c"])
def test_output_inside_the_input_is_refused(tmp_path, cifs, output):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.cif").write_text(cifs[0])
    settings = config(input=str(tmp_path / "in"), output=str(tmp_path / output), targets=[])
    for action in (prepare, plan):
        with pytest.raises(ValueError, match=r"is inside the input .*in: give a directory els"):
            action(settings)
    assert leftovers(tmp_path / "in") == ["a.cif"]


def test_units_that_differ_are_refused(tmp_path, source):
    for split, unit in (("train", "eV"), ("val", "meV")):
        prepare(config(input=source, output=str(tmp_path / split), units={"gap": unit}))
    files = {split: str(tmp_path / split) for split in ("train", "val")}
    with pytest.raises(ValueError, match=r"gap is in meV in .*val and in eV before"):
        prepare(config(**files, output=str(tmp_path / "out")))
    assert leftovers(tmp_path) == ["all.csv", "train", "val"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"on_bad": "ignore"}, "on_bad must be drop or error, got 'ignore'"),
        ({"split": "published"}, r"unknown split 'published': did you mean 'published-123'\?"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"units": {"gpa": "eV"}}, r"units\.gpa: no such target: did you mean 'gap'\?"),
    ],
)
def test_bad_settings(values, words):
    with pytest.raises(ValueError, match=words):
        config(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "give either input=… or train=…"),
        ({"input": "a.csv", "train": "b.csv"}, "give either input=… or train=…"),
        ({"input": "a.csv"}, "'a.csv' does not exist"),
        ({"input": "a.csv", "output": ""}, "setting 'output' is required"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, values, words):
    with pytest.raises(ValueError, match=words):
        prepare(config(**{"output": str(tmp_path / "out")} | values))
    assert leftovers(tmp_path) == []


def test_input_that_changes_on_the_way(tmp_path, cifs, monkeypatch):
    source = write(tmp_path / "all.csv", rows(cifs, 10))
    assign = writing._assign

    def meddle(work, scan):
        write(tmp_path / "all.csv", rows(cifs, 9))
        return assign(work, scan)

    monkeypatch.setattr(writing, "_assign", meddle)
    with pytest.raises(ValueError, match="the input changed while it was read: 'mp-9' is gone"):
        prepare(config(input=source, output=str(tmp_path / "out")))
    assert leftovers(tmp_path) == ["all.csv"]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs" / "prepare").glob("*.yaml")), ids=lambda f: f.stem
)
def test_shipped_configs_are_valid(file):
    from crysforge.trainer.base.command_line import from_sources

    assert from_sources(PrepareConfig, [str(file)]) != PrepareConfig()


def test_plan_writes_nothing(tmp_path, source):
    text = plan(config(input=source, output=str(tmp_path / "out"), n_val=5, n_test=5))
    assert "split count: 30 train, 5 val, 5 test, 0 in none" in text
    assert leftovers(tmp_path) == ["all.csv"]


# The command


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_command_ends_with_a_summary_or_one_line(tmp_path, source):
    out = tmp_path / "out"
    good = start(
        str(SCRIPT), f"input={source}", f"output={out}", "targets=[gap]", "filters.atoms=[2,40]"
    )
    bad = start(
        str(SCRIPT),
        f"input={source}",
        f"output={tmp_path / 'b'}",
        "targets=[gpa]",
        "progress=false",
    )
    text, _ = good.communicate()
    assert good.returncode == 0
    assert "40 crystals: 32 train, 4 val, 4 test" in text and str(out) in text
    text, error = bad.communicate()
    assert bad.returncode == 2 and text == ""
    assert error.splitlines() == [f"error: {source} has no target 'gpa': did you mean 'gap'? "
                                  "valid: gap; if it is in a table of its own, give "
                                  "labels=TABLE"]  # fmt: skip


KILL = """
import os, runpy, signal, sys
from crysforge.datapipe.storage.writer import DatasetWriter
script, left, *arguments = sys.argv[1:]
add, left = DatasetWriter.add, int(left)
def deadly(*args, **options):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return add(*args, **options)
DatasetWriter.add, sys.argv = deadly, [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
"""The command, killed when it adds a crystal."""


def test_killed_then_run_again(tmp_path, cifs):
    source = write(tmp_path / "all.csv", rows(cifs, 300))
    wanted = prepare(config(input=source, output=str(tmp_path / "wanted"), shard_size=20))
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    args = (
        f"input={source}",
        f"output={out}",
        "targets=[gap]",
        "cell=as_is",
        "shard_size=20",
        "workers=2",
    )
    for done in (7, 200):  # in the first shard, after some
        killed = start("-c", KILL, str(SCRIPT), str(done), *args)
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        assert any(partial.glob("*.tar"))
        assert not out.exists()
    process = start(str(SCRIPT), *args)
    assert process.communicate() and process.returncode == 0
    assert Manifest.load(out).fingerprint == wanted.fingerprint
    assert not partial.exists()
