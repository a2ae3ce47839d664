"""Settings of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crysforge.datapipe.cif.formula import NUMBERS
from crysforge.datapipe.common.names import nearest

AGREEMENT = "agreement"

DIRECTIONS = ("down", "toward", "up")


@dataclass(kw_only=True)
class GuidanceConfig:
    """Pushes samples by a property that a finetuned CSPNet predicts."""

    checkpoint: str = ""
    """Finetuned run (encoder `cspnet`, `head=regression` or `linear`); empty: no guidance."""
    target: str = ""
    """Its property; default the only one."""
    direction: str = "down"
    """Where to: `up`, `down`, or `toward` a value."""
    value: float | None = None
    """That value, in the property's unit."""
    strength: float = 1.0
    """How strongly: factor on the gradient of the property over its spread in training."""

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"unknown guidance.direction {self.direction!r}: "
                f"{nearest(self.direction, DIRECTIONS)}"
            )
        if (self.direction == "toward") != (self.value is not None):
            raise ValueError("guidance.value goes with guidance.direction=toward")
        if not 0 < self.strength < 1e6:
            raise ValueError(f"guidance.strength must be positive, got {self.strength}")


@dataclass(kw_only=True)
class GenerateConfig:
    """Settings of `generate`. What is asked for is one of `formula`, `input` and `n`."""

    checkpoint: str = ""
    """Run or model directory of a generative stage."""
    stage: str = ""
    """Stage of a pretraining run; default its last."""
    formula: str = ""
    """Formula unit, such as LiFePO4, whose structures are predicted."""
    input: str = ""
    """CSV file with a column `formula`, and `z` where it has one; or a data set, whose crystals'
    compositions are taken."""
    z: str = "1"
    """Formula units in the cell: 4, 1-4, or 1,2,4."""
    samples: int = 20
    """Samples of each formula and number of formula units."""
    n: int = 0
    """Crystals whose elements the model chooses."""
    atoms: int | None = None
    """Atoms in the cells of those; None: distributed as in training."""
    elements: list[str] = field(default_factory=list)
    """Elements that the model may choose; none: all."""
    split: str = "test"
    """Split of an input that is a data set."""
    count: int = 0
    """Crystals of it that are taken, evenly spread; 0: all."""
    seed: int = 0
    """Seed of all draws. A sample depends on this, its formula and its number alone."""
    output: str = ""
    """Directory to write. What is there of the same request is continued."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """How samples are drawn, where it is to differ from the model's own settings: `steps`,
    `method`, `corrector`, `anneal`."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """A property that samples are pushed by."""
    max_atoms: int = 2048
    """Atoms of a chunk, which is made at once. Other chunks give the same samples to rounding."""
    judge: str = AGREEMENT
    """Who ranks the samples of a formula: `agreement` (structures that more samples agree on come
    first), or a finetuned run that predicts an energy per atom (lower is better)."""
    reference: str = ""
    """Data set in which samples are looked for; default none."""
    trajectory: int = 0
    """Snapshots of every sample's way that are written too."""
    cifs: int = 1000
    """Samples whose structures are written as files of their own, in order of ranked.csv."""
    pictures: int = 12
    """Crystals on the picture sheet; 0: none."""
    force: bool = False
    """Whether elements and sizes that the model has not learned from are tried."""

    def __post_init__(self) -> None:
        asked = [name for name in ("formula", "input", "n") if getattr(self, name)]
        if len(asked) > 1:
            raise ValueError(f"give one of formula, input and n, not {' and '.join(asked)}")
        for name, least in (("samples", 1), ("max_atoms", 1), ("n", 0), ("count", 0), ("cifs", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("trajectory", "pictures"):
            if not 0 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} must be from 0 to 1000, got {getattr(self, name)}")
        if self.atoms is not None and self.atoms < 1:
            raise ValueError(f"atoms must be at least 1, got {self.atoms}")
        if not self.n and (self.atoms or self.elements):
            raise ValueError("atoms and elements go with n=N, where the model chooses")
        parse_units(self.z)
        numbers_of(self.elements)


def parse_units(text: str) -> list[int]:
    """Formula units from `4`, `1-4` or `1,2,4`.

    Raises:
        ValueError: it is none of these.
    """
    out: list[int] = []
    for part in str(text).split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError(f"z={text} is no number of formula units: give 4, 1-4 or 1,2,4")
        if max(len(low), len(high)) > 4:
            raise ValueError(f"z={text} is no number of formula units in a cell")
        out += range(int(low), int(high or low) + 1)
    if not out or min(out) < 1:
        raise ValueError(f"z={text} holds no number of formula units")
    return sorted(set(out))


def numbers_of(symbols: Sequence[str]) -> list[int]:
    """Atomic numbers of elements. Raises ValueError for one that is none."""
    for symbol in symbols:
        if symbol not in NUMBERS:
            raise ValueError(f"elements: {symbol!r} is no element")
    return [NUMBERS[s] for s in symbols]
