"""What `manifest.json` says: the completeness marker of a data set and all that is known of it."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from crysforge.datapipe.common.checked import (
    Count,
    Finite,
    Hash,
    Line,
    Name,
    Number,
    Rule,
    Split,
    between,
    checked,
    matching,
    sized,
)
from crysforge.datapipe.common.safe_read import parse_json
from crysforge.datapipe.storage.remote import DEFAULT, Access, join_path, open_file, read_file

MAX_FOLDS = 32
"""Most folds of a data set: which of them a crystal validates is a bit of 32."""

__all__ = ["MANIFEST", "SPLITS", "Manifest", "Shard", "Target", "join_path", "open_file"]

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
MANIFEST = "manifest.json"
MAX_MANIFEST = 1 << 26
"""Bytes of the longest manifest: about 400,000 shards."""
_Spread = Annotated[float, Rule("finite and not negative", lambda x: 0 <= x < math.inf)]
_Plain = Line | int | float | bool | None


@dataclass(frozen=True)
class Shard:
    """One tar of a data set."""

    name: Annotated[str, matching(r"(train|val|test)-\d{6}\.tar", "a shard's name")]
    split: Split
    count: Annotated[int, between(1, 2**40)]
    """Crystals in it."""
    bytes: Annotated[int, between(1, 2**50)]
    sha256: Hash

    def __post_init__(self) -> None:
        if not self.name.startswith(f"{self.split}-"):
            raise ValueError(f"{self.name} is not of the {self.split} split")


@dataclass(frozen=True)
class Target:
    """What is known of a label. Mean and population standard deviation are those of the labelled
    training crystals; None without any."""

    unit: Line | None
    mean: Finite | None
    std: _Spread | None
    labelled: dict[Split, Count]
    """Labelled crystals per split."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: the completeness marker of a data set and all that is known about it."""

    schema_version: Annotated[int, between(1, 1)]
    created_by: Line
    splits: Annotated[dict[Split, Annotated[int, between(0, 2**40)]], sized(3, 3)]
    """Crystals per split."""
    shards: list[Shard]
    """All of train, then val, then test: this is the order of item numbers and of the index."""
    index_sha256: Hash
    elements: list[Number]
    """Atomic numbers that occur, ascending."""
    targets: dict[Name, Target]
    provenance: dict[str, Any]
    """Where the crystals came from: source files with hashes, filters, counts of what was
    dropped."""
    graphs: dict[Annotated[str, matching("[0-9a-f]{12}", "a graph's key")], dict[Name, _Plain]] = (
        field(default_factory=dict)
    )
    """Graph specs by key, of the graphs that are stored with the crystals (preparing/bake.py)."""
    folds: dict[Literal["count"], Annotated[int, between(2, MAX_FOLDS)]] = field(
        default_factory=dict
    )
    """`count` of the folds, if there are any; the index says which a crystal is in. All crystals of
    such a data set lie in train."""

    def __post_init__(self) -> None:
        order = [(SPLITS.index(s.split), s.name) for s in self.shards]
        if any(a >= b for a, b in pairwise(order)):
            raise ValueError("shards are not in order: train, val, test, each by number")
        for split in SPLITS:
            held = sum(s.count for s in self.shards if s.split == split)
            if held != self.splits[split]:
                raise ValueError(f"{split} shards hold {held} crystals, splits say otherwise")
        if self.folds and self.splits["train"] != sum(self.splits.values()):
            raise ValueError("it has folds, and crystals outside train")
        if any(a >= b for a, b in pairwise(self.elements)):
            raise ValueError("elements do not ascend")

    def check(self) -> None:
        """Raises ValueError for a value that `load` would refuse: a name or unit of many lines."""
        checked(Manifest, asdict(self), "the data set")

    @property
    def fingerprint(self) -> str:
        """Identifies the crystals, their order and labels: a hash over the shards' hashes. Of a
        data set with folds, these too."""
        text = "\n".join(f"{s.split} {s.count} {s.sha256}" for s in self.shards)
        if self.folds:
            text += f"\n{self.index_sha256}"
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
        where = join_path(root, MANIFEST)
        if len(data) > MAX_MANIFEST:
            raise ValueError(f"{where} has more than {MAX_MANIFEST} bytes")
        values = parse_json(data, where)
        found = values.get("schema_version") if isinstance(values, dict) else None
        if found != SCHEMA_VERSION:
            raise ValueError(
                f"{root} has data-set schema version {repr(found)[:40]}, this code reads "
                f"{SCHEMA_VERSION}: prepare the data again or use the matching release"
            )
        return checked(cls, values, where)


def _check_json(path: Path) -> None:
    with open(path, "rb") as file:
        parse_json(file.read(MAX_MANIFEST + 1), MANIFEST)
