"""Settings of what is done with data sets: verify, inspect, merge, subset, reshard, bake."""

from __future__ import annotations

from dataclasses import dataclass, field

from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.crystals.pair_bound import MAX_PAIRS
from crysforge.datapipe.storage.manifest import SPLITS


@dataclass(kw_only=True)
class VerifyConfig:
    """Settings of `verify`."""

    verify: str = ""
    """Data set: directory or URL."""
    workers: int = 0
    """Processes; 0: one for each core."""
    progress: bool = True
    """Whether to show a progress bar."""


@dataclass(kw_only=True)
class InspectConfig:
    """Settings of `inspect`."""

    inspect: str = ""
    """Data set: directory or URL."""
    output: str = ""
    """PNG file of the histograms; default: histograms.png in the data set's directory."""
    symprec: list[float] = field(default_factory=list)
    """Tolerances in Å at which space groups are searched; none: they are not."""
    workers: int = 0
    """Processes; 0: one for each core."""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        if not all(0 < tolerance < 1 for tolerance in self.symprec):
            raise ValueError(
                f"symprec are tolerances in Å, such as [0.01, 0.1], got {self.symprec}"
            )


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


@dataclass(kw_only=True)
class BakeConfig:
    """Settings of `bake`."""

    bake: str = ""
    """Data set: directory or URL."""
    output: str = ""
    """Directory of the new data set."""
    shard_size: int | None = None
    """Crystals in a shard; None: as many as there are, so that the order of training is the
    same."""
    max_pairs: int = MAX_PAIRS
    """Pairs of atoms, or images of atoms, that are looked at for the graph of one crystal."""
    workers: int = 0
    """Processes that build graphs; 0: one for each core."""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        if self.max_pairs < 1:
            raise ValueError(f"max_pairs must be at least 1, got {self.max_pairs}")
