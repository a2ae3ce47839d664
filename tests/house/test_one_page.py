"""docs/one_page.py does what it says, as it is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_trains(tmp_path):
    command = [sys.executable, str(ROOT / "docs/one_page.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"[\d.]+(?= (?:before|after))", done.stdout))
    assert after < 0.9 * before
    assert (tmp_path / "model/model.safetensors").is_file()


def test_it_is_a_page():
    assert len((ROOT / "docs/one_page.py").read_text().splitlines()) <= 130
