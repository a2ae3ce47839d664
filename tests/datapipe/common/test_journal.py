"""A journal of somebody else is begun anew or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from crysforge.datapipe.common.journal import Journal
from crysforge.datapipe.preparing.duplicates.records import OUTCOME

MATCH = {
    "item": 0, "id": "a", "formula": "NaCl", "set": 0, "other": 1, "other_id": "b",
    "by": "id", "rms": None, "largest": 0.1,
}  # fmt: skip
FOUND: dict[str, Any] = {"matches": [MATCH], "undecided": [], "pairs": {"formula": 1}}


def test_a_journal_of_another_form_is_begun_anew(tmp_path):
    path = tmp_path / "decided.jsonl"
    good = json.dumps(["a", FOUND])
    for bad in ('["b"]', '[["b"], {}]', '["b", {"matches": 3}]', "{}", "3", "[" * 9999, '"b"'):
        path.write_text(f"{good}\n{bad}\n{good}\n")
        journal = Journal(path, OUTCOME)
        assert list(journal.done) == ["a"]
        journal.close()
        assert path.read_text() == good + "\n"
    path.unlink()
    (tmp_path / "mine").write_text("mine")
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="is no regular file"):
        Journal(path)
    assert (tmp_path / "mine").read_text() == "mine"
