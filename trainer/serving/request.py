"""What a file of predictions was asked for, kept beside it: the same command, given again after a
kill at the very end, finds that its work is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from crysforge.datapipe.common.checked import Count, Hash, Name
from crysforge.datapipe.common.files import sha256, write_json
from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.datapipe.preparing.request import HOW, request_of
from crysforge.datapipe.preparing.work import origin
from crysforge.trainer.runs.model_directory import open_model
from crysforge.trainer.serving.config import PredictConfig
from crysforge.trainer.serving.ensemble import ENSEMBLE

REQUEST = {"request": Name, "sha256": Hash, "written": Count, "dropped": Count}
"""What is kept."""


def request_for(config: PredictConfig) -> str:
    """Identifies the predictions that are asked for, by settings, model and input."""
    root = Path(config.checkpoint)
    ensemble = (root / ENSEMBLE).is_file()
    members = sorted(p for p in root.iterdir() if p.is_dir()) if ensemble else [root]
    weights = [sha256(open_model(member).file) for member in members]
    facts = [weights, origin(config.input, config.format)]
    return request_of(config, facts, (*HOW, "checkpoint", "device", "max_atoms"))


def request_path(output: Path) -> Path:
    """Where the request of a file of predictions is."""
    return output.with_name(f"{output.stem}.request.json")


def keep_request(output: Path, request: str, digest: str, counts: Mapping[str, int]) -> None:
    """Notes what `output` was asked for, before it takes its place.

    Args:
        digest: SHA-256 of what will be `output`. counts: `written` and `dropped` crystals.
    """
    write_json(request_path(output), {"request": request, "sha256": digest, **dict(counts)})


def predicted_before(output: Path, request: str) -> tuple[int, int] | None:
    """(written, dropped) crystals, if `output` is there and is what is asked for."""
    try:
        known = read_mapping(request_path(output), REQUEST)
        if known["request"] == request and known["sha256"] == sha256(output):
            return known["written"], known["dropped"]
    except (OSError, ValueError):
        pass  # there is no such file, or it is of another kind
    return None
