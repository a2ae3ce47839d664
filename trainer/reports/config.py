"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    suite: str = ""
    """Directory of a suite, of a sweep that was submitted, or of runs."""
    output: str = ""
    """Where the report goes; default `report` in the suite's directory. A report there is
    replaced."""
    baseline: str = ""
    """`FACTOR=VALUE` that the factor's other values are compared with; default the suite's."""
    rows: list[str] = field(default_factory=list)
    """Factors that name the rows of the main table; default all that vary but `columns`."""
    columns: str = ""
    """Factor whose values are its columns; default the compared one."""
    split: str = "test"
    """`test` or `val`."""
    paper: str = ""
    """Published tables to set beside (`crysldnet-unified`, `dpf`, …); default the suite's. Without
    a suite a paper, of which every table and figure is listed: `crysldnet`, `dpf`, `dao`, …"""
    runs: str = "runs"
    """Where the suites' outputs are looked for, each in a folder of its name, without a suite."""
    data: list[str] = field(default_factory=list)
    """Where to look for data sets that are no longer where the runs found them."""
    data_dir: str = ""
    """URL below which data sets may be opened where the runs found them; elsewhere only paths."""
    confidence: float = 0.95
    """Of the intervals."""
    resamples: int = 10_000
    """Draws of the bootstrap over crystals."""
    figures: bool = True
    """Whether to draw."""
    space_groups: bool = True
    """Whether to look for the space group of every crystal (some milliseconds each)."""

    def __post_init__(self) -> None:
        if self.split not in ("test", "val"):
            raise ValueError(f"split must be test or val, got {self.split!r}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {self.confidence}")
        if self.resamples < 1:
            raise ValueError(f"resamples must be positive, got {self.resamples}")
