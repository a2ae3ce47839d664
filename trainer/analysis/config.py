"""Settings of an analysis."""

from __future__ import annotations

from dataclasses import dataclass, field

from crysforge.datapipe.common.names import nearest

ANALYSES = ("probes", "information", "smoothness", "variance", "invariance", "collapse", "map")


@dataclass(kw_only=True)
class AnalysisConfig:
    """What is analysed, and on how much."""

    split: str = "test"
    """Split that is looked at and judged on."""
    fit_split: str = "train"
    """Split that probes are fitted on."""
    count: int = 1000
    """Crystals looked at, drawn by the seed."""
    fit_count: int = 2000
    """Crystals that probes are fitted on."""
    mask_ratio: float = 0.3
    """Share of the atoms whose element is hidden, for the probe of elements."""
    max_pairs: int = 20000
    """Atoms behind the mutual information."""
    seeds: int = 3
    """Networks that the mutual information is the mean of."""
    seed: int = 0
    """Seed of the draws."""
    targets: list[str] | None = None
    """Labels that colour the map; None: all."""
    analyses: list[str] = field(default_factory=lambda: list(ANALYSES))
    """Which to make."""

    def __post_init__(self) -> None:
        for name in self.analyses:
            if name not in ANALYSES:
                raise ValueError(f"unknown analysis {name!r}: {nearest(name, ANALYSES)}")
        for name, least in (("count", 2), ("fit_count", 20), ("max_pairs", 100), ("seeds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
