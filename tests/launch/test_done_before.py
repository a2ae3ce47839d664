"""A command that was killed when its work was done ends well when it is given again; one that asks
for something else is refused as ever."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crysforge.datapipe.storage.dataset import Dataset, Manifest

DEADLY = """
import os, signal, sys
from importlib import import_module
from pathlib import Path

rename, target, script, *args = sys.argv[1:]
real = getattr(os, rename)

def deadly(source, to, **options):
    real(source, to, **options)
    if Path(to) == Path(target):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":  # not in the workers it starts
    setattr(os, rename, deadly)
    sys.argv = [script, *args]
    import_module(f"crysforge.launch.{script}").main()
"""


def killed_after(rename: str, target: Path, script: str, *args: str) -> None:
    """Runs a script in a process that is killed when it has moved its output into place."""
    command = [sys.executable, "-c", DEADLY, rename, str(target), script, *args]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def content(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in root.iterdir()}


COMMANDS = {
    "prepare": ["input=prototypes", "size=200", "targets=[density]"],
    "dedup": ["input={set}", "duplicates.within=true", "split=keep"],
    "merge": ["merge=[{set},{set}]", "same_id=first"],
    "subset": ["subset={set}", "count=7"],
    "reshard": ["reshard={set}", "shard_size=20"],
    "bake": ["bake={set}", "encoders=[schnet]"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_data_set_that_is_there_is_what_was_asked_for(command, call, data, tmp_path):
    output = tmp_path / "out"
    args = [a.format(set=data) for a in COMMANDS[command]]
    args += [f"output={output}", "progress=false"]
    if command not in ("merge", "subset", "reshard"):
        args.append("workers=1")
    killed_after("rename", output, "prepare", *args)
    before = content(output)
    assert "lock" in before  # it was killed before it had removed it
    code, out, err = call("prepare", *args)
    assert code == 0, err
    assert f"written to {output}" in out
    assert content(output) == {k: v for k, v in before.items() if k != "lock"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert call("prepare", *args)[0] == 0
    # something else, or of other files
    other = {"subset": "count=8", "merge": "same_id=rename"}.get(command, "shard_size=99")
    code, _, err = call("prepare", *args, other)
    assert code == 2 and "already holds a data set" in err
    assert content(output) == {k: v for k, v in before.items() if k != "lock"}


def test_another_input_under_the_same_name_is_another_request(call, data, tmp_path):
    shutil.copytree(data, tmp_path / "in")
    args = [f"input={tmp_path}/in", f"output={tmp_path}/out", "progress=false", "workers=1"]
    assert call("prepare", *args)[0] == 0
    shutil.rmtree(tmp_path / "in")
    call("prepare", f"subset={data}", f"output={tmp_path}/in", "count=20", "progress=false")
    code, _, err = call("prepare", *args)
    assert code == 2 and "already holds a data set" in err
    assert len(Dataset.open(tmp_path / "out")) == 90
    (tmp_path / "out" / "manifest.json").write_text("{")
    code, _, err = call("prepare", *args)
    assert code == 2 and "already holds a data set" in err
    assert "request" in Manifest.load(tmp_path / "in").provenance


@pytest.mark.parametrize("bad", [False, True])
def test_predictions_that_are_there_are_what_was_asked_for(bad, call, data, runs, tmp_path):
    output = tmp_path / "out.csv"
    source = tmp_path / "in.xyz"
    frame = 'Lattice="6 0 0 0 6 0 0 0 6" Properties=species:S:1:pos:R:3\nNa 0 0 0\nCl 3 0 0\n'
    close = frame.replace("3 0 0\n", "0.1 0 0\n")
    source.write_text(f"2\n{frame}" * 3 + (f"2\n{close}" if bad else ""))
    args = [f"checkpoint={runs}/fine", f"input={source}", f"output={output}", "workers=1"]
    killed_after("replace", output, "predict", *args)
    before = content(tmp_path)
    names = {"in.xyz", "out.csv", "out.request.json", *(["out.dropped.csv"] if bad else [])}
    assert before.keys() == names
    code, out, err = call("predict", *args)
    assert code == 0 and "3 predictions are there already" in out, err
    assert content(tmp_path) == before
    for change in ([f"checkpoint={runs}/pre"], [f"input={data}"], ["limits.atoms=5"]):
        code, _, err = call("predict", *args, *change)
        assert code == 2 and "out.csv exists: choose another output" in err
    output.write_text(output.read_text() + "x\n")
    code, _, err = call("predict", *args)
    assert code == 2 and "out.csv exists: choose another output" in err
    code, _, err = call("predict", *args, "overwrite=true")
    assert code == 0 and content(tmp_path) == before, err


TEAM = [f"metadata.{k}=x" for k in ("model_name", "team_name", "project_url", "author_email")]
DIRECTORIES = {
    "export": (["checkpoint={runs}/fine", "license=cc-by-4.0"], "license=mit"),
    "ensemble": (["runs=[{runs}/fine,{copy}]"], "runs=[{copy},{runs}/fine]"),
    "leaderboard": (["to=jarvis", "runs=[{runs}/fine]", *TEAM], "metadata.team_name=y"),
    "analyse": (
        ["checkpoint={runs}/pre", "data={data}", "analyses=[smoothness,variance]", "count=9"],
        "count=8",
    ),
}


@pytest.mark.parametrize("script", DIRECTORIES)
def test_a_directory_that_is_there_is_what_was_asked_for(script, call, data, runs, tmp_path):
    output, places = tmp_path / "out", {"runs": runs, "copy": tmp_path / "copy", "data": data}
    shutil.copytree(runs / "fine", tmp_path / "copy")
    args, other = DIRECTORIES[script]
    args = [*(a.format(**places) for a in args), f"output={output}"]
    killed_after("rename", output, script, *args)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    for _ in range(2):
        code, out, err = call(script, *args)
        assert code == 0 and str(output) in out, err
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "out"]
    code, _, err = call(script, *args, other.format(**places))
    assert code == 2 and "out exists: choose another output" in err
    changed = output / {"analyse": "analysis.json"}.get(script, "more.txt")
    changed.write_text("{}")
    code, _, err = call(script, *args)
    assert code == 2 and "out exists: choose another output" in err
    assert changed.read_text() == "{}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "out"]
