"""The wheel, installed beside names that a user may have in their own folder, runs the main job."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.launching import FINETUNE, PRETRAIN

ROOT = Path(__file__).resolve().parents[2]


def run(*command, **options) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A clean environment with the wheel; what we depend on is that of this environment."""
    root = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", root / "dist"]
    run(*pip, *build, copy_of_the_checkout(root / "source"))
    run(sys.executable, "-m", "venv", "--without-pip", root / "venv")
    python = root / "venv/bin/python"
    (wheel,) = (root / "dist").glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root / "venv/bin"


def copy_of_the_checkout(path: Path) -> Path:
    """What git knows of this checkout, so that no build leaves anything in it."""
    names = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes((ROOT / name).read_bytes())
    return path


@pytest.fixture
def hostile(tmp_path, monkeypatch) -> Path:
    """A folder whose files have the names of our parts."""
    for name in ("datapipe", "models", "trainer", "launch", "configs"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was imported')\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/__init__.py").write_text("raise SystemExit('a stranger was imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def test_the_main_job_runs_from_the_wheel(installed, hostile):
    crysforge = installed / "crysforge"
    assert "pretrain" in run(crysforge)
    run(crysforge, "prepare", "input=prototypes", "size=200", "output=data", "targets=[density]")
    run(crysforge, "pretrain", *PRETRAIN, "data=data", "run_dir=pre", "stages=[vae]")
    job = [*FINETUNE, "data=data", "init_from=pre", "target=density", "run_dir=fine"]
    run(crysforge, "submit", "job=finetune", "cluster=local", *job)
    run(crysforge, "predict", "checkpoint=fine", "input=data", "output=predictions.csv")
    assert len(Path("predictions.csv").read_text().splitlines()) == 201
    used = next(Path("fine.submit").glob("code-*"))
    assert (used / "crysforge/__init__.py").is_file() and (used / "configs/pretrain").is_dir()
    code = "from crysforge import load; print(load('fine').targets)"
    assert "density" in run(installed / "python", "-c", code)


def test_the_wheel_holds_what_it_needs_and_no_more(installed):
    code = "import crysforge, pathlib; print(pathlib.Path(crysforge.__file__).parent)"
    package = Path(run(installed / "python", "-I", "-c", code).strip())
    names = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
    for part in ("datapipe", "models", "trainer", "launch"):
        ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / part).rglob("*.py")}
        assert ours <= names, sorted(ours - names)
    configs = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= names and "py.typed" in names
    tops = {p.name for p in package.parent.iterdir()}
    assert not tops & {"datapipe", "models", "trainer", "launch", "configs", "tests", "benchmarks"}
