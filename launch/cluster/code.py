"""The code that jobs run: of a checkout or of an installed package, copied at submission, so that
later edits do not reach jobs that wait."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import crysforge

HOME = Path(crysforge.__file__).resolve().parent
ROOT = HOME if (HOME / "models").is_dir() else HOME.parent
"""Where the parts lie: the installed package, or a checkout."""
PARTS = ("crysforge", "datapipe", "models", "trainer", "launch", "configs")


def code_files() -> dict[str, Path]:
    """Files by their name in a copy, which has the layout of a checkout.

    Of a repository, those that git tracks, as they are now, and new ones in the parts that it does
    not ignore; elsewhere the parts.
    """
    names = _git("ls-files", "-z").split("\0")
    names += _git("ls-files", "-z", "--others", "--exclude-standard", *PARTS).split("\0")
    if any(names):
        files = {name: ROOT / name for name in names if name}
    else:
        files = {f"crysforge/{p.name}": p for p in HOME.iterdir()}
        for part in (p for p in PARTS if p != "crysforge"):
            for path in (ROOT / part).rglob("*"):
                files[path.relative_to(ROOT).as_posix()] = path
    kept = {k: p for k, p in files.items() if (p.is_file() or p.is_symlink())}
    return {k: p for k, p in sorted(kept.items()) if "__pycache__" not in p.parts}


def commit() -> str:
    """Hash of the checked-out commit, with `+` if files differ from it; empty without git."""
    head = _git("rev-parse", "HEAD").strip()
    return head + ("+" if head and _git("status", "--porcelain", "-uno") else "")


def _git(*args: str) -> str:
    """Output of a git command about the code; empty if it fails, or `ROOT` is no repository."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""
