"""Commands import what is heavy once their arguments are known to be right; benchmarks/startup.py
measures what that saves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crysforge.launch.cli import commands

ROOT = Path(__file__).resolve().parents[2]
FROM_STAGES = ("finetune", "pretrain")
HEAVY = {"deepspeed", "matplotlib", "pandas", "pymatgen", "pymatgen.core", "torch"}
HEAVY |= {"torch_geometric", "scipy", "webdataset", "tensorboard"}
THROUGH_STAGES = {"torch", "scipy", "pymatgen"}
"""What stages import; of pymatgen only the search for neighbours, a file by itself."""

RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("modules:", *sys.modules)
"""


def imported(*command: str) -> tuple[int, str, set[str]]:
    """(exit code, what was printed, modules that were imported) of a Python process."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    text, _, modules = done.stdout.rpartition("modules: ")
    return done.returncode, text + done.stderr, {*modules.split()}


def heavy(command: str, modules: set[str]) -> set[str]:
    found = HEAVY & modules
    return found - THROUGH_STAGES if command in FROM_STAGES else found


@pytest.mark.parametrize("command", commands())
def test_help_needs_nothing_heavy(command):
    code, text, modules = imported("-c", RUN, f"launch/{command}.py", "--help")
    assert code == 0, text
    assert "settings: KEY=VALUE" in text
    assert "crysforge.trainer.base.command_line" in modules
    assert not heavy(command, modules)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("analyse", ["chekpoint=runs/a"]),
        ("ensemble", ["runs=[a,b]"]),  # no output
        ("evaluate", ["suite=a", "confidence=2"]),
        ("export", ["checkpoint=a", "output=b", "stage=vae", "tag=newest"]),
        ("finetune", ["traget=band_gap"]),
        ("predict", ["checkpoint=a", "input=b", "output=b"]),
        ("prepare", ["input=a", "cell=primitve"]),
        ("prepare", ["verify=a", "wrokers=2"]),
        ("prepare", ["bake=a", "encoders=[pddformer]"]),
        ("prepare", ["inspect=a", "symprec=[7]"]),
        ("prepare", ["merge=[a,b]", "output=c", "same_id=frist"]),
        ("pretrain", ["stages=[vea]", "data=a", "run_dir=b"]),
        ("submit", ["status=a", "stauts=b"]),
    ],
)
def test_mistakes_are_told_before_anything_heavy_is_imported(command, arguments):
    code, text, modules = imported("-c", RUN, f"launch/{command}.py", *arguments)
    assert code == 2
    assert "error: " in text
    assert not heavy(command, modules)


def test_a_model_is_loaded_without_what_it_does_not_use():
    model = ROOT / "tests/data/schema-2/model"
    code = f"import sys; from crysforge import load; load({str(model)!r})"
    status, text, modules = imported("-c", f"{code}; print('modules:', *sys.modules)")
    assert status == 0, text
    assert "torch" in modules
    assert not modules & (HEAVY - THROUGH_STAGES)


def test_a_package_that_is_imported_for_its_version_brings_nothing():
    _, _, modules = imported("-c", "import crysforge, sys; print('modules:', *sys.modules)")
    assert not modules & {*HEAVY, "numpy", "omegaconf"}
