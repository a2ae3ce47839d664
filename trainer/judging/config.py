"""Settings of an evaluation, of suites or of generated crystals."""

from __future__ import annotations

from dataclasses import dataclass

from crysforge.datapipe.common.names import nearest
from crysforge.trainer.reports.config import EvaluateConfig

OXIDATION = ("smact14", "icsd")
"""Sets of oxidation states."""


@dataclass(kw_only=True)
class JudgeConfig(EvaluateConfig):
    """Settings of an evaluation: one of `suite`, `csp` and `generation` says of what."""

    csp: str = ""
    """Folder of `generate input=DATA`: structures predicted for the crystals of a data set."""
    generation: str = ""
    """Folder of `generate n=N`: crystals of the model's choice."""
    reference: str = ""
    """Data set that they are compared with: its `split`, and what was learned from in `train`."""
    workers: int = 0
    """Processes; 0: one for each core."""
    seed: int = 0
    """Of the baselines without a model."""
    baselines: bool = True
    """Whether structure prediction without a model stands beside."""
    oxidation: str = "smact14"
    """Set of oxidation states that validity goes by: smact14 or icsd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in ("suite", "csp", "generation") if getattr(self, n)]
        if len(given) > 1:
            raise ValueError(f"give one of suite, csp and generation, not {' and '.join(given)}")
        if (self.csp or self.generation) and not self.reference:
            raise ValueError(f"{given[0]}={getattr(self, given[0])} needs reference=DATA")
        if not 0 <= self.workers <= 1024:
            raise ValueError(f"workers must be from 0 to 1024, got {self.workers}")
        if self.oxidation not in OXIDATION:
            raise ValueError(
                f"unknown oxidation {self.oxidation!r}: {nearest(self.oxidation, OXIDATION)}"
            )
