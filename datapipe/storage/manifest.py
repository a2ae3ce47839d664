"""What `manifest.json` says: the completeness marker of a data set and all that is known of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from crysforge.datapipe.storage.remote import DEFAULT, Access, join_path, open_file, read_file

__all__ = ["MANIFEST", "SPLITS", "Manifest", "Shard", "Target", "join_path", "open_file"]

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
MANIFEST = "manifest.json"
MAX_MANIFEST = 1 << 26
"""Bytes of the longest manifest; that of a hundred million crystals has a third of it."""
SHARD_NAME = re.compile(r"(train|val|test)-\d{6}\.tar")


@dataclass(frozen=True)
class Shard:
    """One tar of a data set."""

    name: str
    split: str
    count: int
    """Crystals in it."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Target:
    """What is known of a label. Mean and population standard deviation are those of the labelled
    training crystals; None without any."""

    unit: str | None
    mean: float | None
    std: float | None
    labelled: dict[str, int]
    """Labelled crystals per split."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: the completeness marker of a data set and all that is known about it."""

    schema_version: int
    created_by: str
    splits: dict[str, int]
    """Crystals per split."""
    shards: list[Shard]
    """All of train, then val, then test: this is the order of item numbers and of the index."""
    index_sha256: str
    elements: list[int]
    """Atomic numbers that occur, ascending."""
    targets: dict[str, Target]
    provenance: dict[str, Any]
    """Where the crystals came from: source files with hashes, filters, counts of what was
    dropped."""
    graphs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Graph specs by key, of the graphs that are stored with the crystals; see `datapipe.preparing.bake`."""

    @property
    def fingerprint(self) -> str:
        """Identifies the crystals, their order and labels: a hash over the shards' hashes."""
        text = "\n".join(f"{s.split} {s.count} {s.sha256}" for s in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def load(cls, root: str | os.PathLike, access: Access = DEFAULT) -> Manifest:
        """Reads and checks the manifest of the data set at `root` (a path or URL, see
        `datapipe.storage.remote`).

        Raises:
            ValueError: not a data set, another schema version, unknown or missing keys; it cannot
                be reached.
        """
        try:
            data = read_file(root, MANIFEST, access, _check_json, MAX_MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{root} is not a data set: it has no complete {MANIFEST}") from None
        except OSError as error:
            raise ValueError(f"{root}: {error}") from None
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{join_path(root, MANIFEST)} is not JSON: {error}") from None
        found = values.get("schema_version") if isinstance(values, dict) else None
        if found != SCHEMA_VERSION:
            raise ValueError(
                f"{root} has data-set schema version {found!r}, this code reads "
                f"{SCHEMA_VERSION}: prepare the data again or use the matching release"
            )
        try:
            _check_keys(cls, values, "")
            for shard in values["shards"]:
                _check_keys(Shard, shard, "shards.")
                if not SHARD_NAME.fullmatch(shard["name"]):
                    raise ValueError(f"bad shard name {shard['name']!r}")
            for name, target in values["targets"].items():
                _check_keys(Target, target, f"targets.{name}.")
            values["shards"] = [Shard(**x) for x in values["shards"]]
            values["targets"] = {k: Target(**x) for k, x in values["targets"].items()}
            manifest = cls(**values)
            specs = manifest.graphs.values() if isinstance(manifest.graphs, dict) else [None]
            if not all(isinstance(spec, dict) for spec in specs):
                raise ValueError("graphs must map keys to specs of graphs")
            for split in SPLITS:
                held = sum(s.count for s in manifest.shards if s.split == split)
                if held != manifest.splits[split]:
                    raise ValueError(f"{split} shards hold {held} crystals, splits say otherwise")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{join_path(root, MANIFEST)} is damaged: {error}") from None
        return manifest


def _check_json(path: Path) -> None:
    json.loads(path.read_bytes())


def _check_keys(cls: type, values: Mapping[str, Any], where: str) -> None:
    known = {f.name: f.default_factory is MISSING for f in fields(cls)}  # name: is it required
    for key in known.keys() ^ values.keys():
        if known.get(key, True):
            raise ValueError(f"{'missing' if key in known else 'unknown'} key {where + key!r}")
