"""Settings of what makes new data sets from old ones: merge, subset, reshard."""

from __future__ import annotations

from dataclasses import dataclass, field

from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.storage.manifest import SPLITS


@dataclass(kw_only=True)
class MergeConfig:
    """Settings of `merge`."""

    merge: list[str] = field(default_factory=list)
    """Data sets, each a directory or URL. Every crystal stays in its split."""
    output: str = ""
    """Directory of the new data set."""
    targets: str = "union"
    """Labels to keep: union (missing ones are NaN) or intersection of those of the sets."""
    units: dict[str, str] = field(default_factory=dict)
    """Units of labels of which some set does not know it."""
    same_id: str = "error"
    """What to do with an id that an earlier set has: error; first (leave the crystal out); rename
    (to <set>/<id>)."""
    shard_size: int = 1000
    """Crystals in a shard."""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        if self.targets not in ("union", "intersection"):
            raise ValueError(f"targets must be union or intersection, got {self.targets!r}")
        if self.same_id not in ("error", "first", "rename"):
            raise ValueError(f"same_id must be error, first or rename, got {self.same_id!r}")


@dataclass(kw_only=True)
class SubsetConfig:
    """Settings of `subset`. A crystal must pass all that is given; then `count` are drawn."""

    subset: str = ""
    """Data set: directory or URL."""
    output: str = ""
    """Directory of the new data set."""
    splits: list[str] = field(default_factory=lambda: list(SPLITS))
    """Splits to take from."""
    ids: str = ""
    """File of the ids to take, one a line."""
    filters: Filters = field(default_factory=Filters)
    """Which crystals to take."""
    labelled: list[str] = field(default_factory=list)
    """Labels that a crystal must have."""
    count: int | None = None
    """Crystals to draw at random from what is left; None: all."""
    seed: int = 123
    """Seed of the draw."""
    shard_size: int = 1000
    """Crystals in a shard."""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise ValueError(f"splits must be some of {', '.join(SPLITS)}, got {list(self.splits)}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


@dataclass(kw_only=True)
class ReshardConfig:
    """Settings of `reshard`."""

    reshard: str = ""
    """Data set: directory or URL."""
    output: str = ""
    """Directory of the new data set."""
    shard_size: int = 1000
    """Crystals in a shard."""
    progress: bool = True
    """Whether to show a progress bar."""
