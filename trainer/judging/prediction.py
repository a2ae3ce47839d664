"""Structure prediction judged: how near the structures that were made are to those that exist."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.preparing.duplicates.matcher import Reduced
from crysforge.trainer.generation.known import Composition, composition_of
from crysforge.trainer.judging.distances import CSP, DEFAULT, distance
from crysforge.trainer.judging.validity import composition_valid, structure_valid
from crysforge.trainer.reports.formats import Number, Table

STRICT = 0.1
"""Root mean square displacement within which a structure counts as found."""


@dataclass(frozen=True)
class Question:
    """A crystal and what was made of its composition, in order of the samples."""

    target: Crystal
    made: Sequence[Crystal]


@dataclass(frozen=True)
class Answer:
    """What comes of a question.

    Attributes:
        distances: of each sample, infinite without a match, at the papers' tolerances.
        strict_cells: whether it matches at pymatgen's own tolerances too.
        valid: whether it passes CDVAE's checks.
        target_valid: whether the target does.
        failed: samples that could not be compared, and why.
    """

    target: str
    composition: Composition
    distances: list[float] = field(default_factory=list)
    strict_cells: list[bool] = field(default_factory=list)
    valid: list[bool] = field(default_factory=list)
    target_valid: bool = False
    failed: list[str] = field(default_factory=list)

    def best(self, k: int, gated: bool = False) -> float:
        """The least distance among the first k samples; of valid ones of a valid target, if
        `gated`."""
        if gated and not self.target_valid:
            return math.inf
        pairs = zip(self.distances[:k], self.valid[:k], strict=True)
        return min((d for d, valid in pairs if valid or not gated), default=math.inf)


def judge(question: Question) -> Answer:
    """Compares what was made with the target; every structure by itself."""
    target = question.target
    out = Answer(
        target.id,
        composition_of(target),
        target_valid=composition_valid(target) and structure_valid(target),
    )
    known = _reduced(target, out.failed)
    for crystal in question.made:
        made = _reduced(crystal, out.failed) if known else None
        found, tight = math.inf, False
        if made is not None and known is not None:
            try:
                value = distance(made, known)
                found = math.inf if value is None else value
                tight = value is not None and distance(made, known, DEFAULT) is not None
            except Exception as error:  # pymatgen gives up on a pair in more ways than one
                out.failed.append(f"{crystal.id}: {type(error).__name__}: {error}")
        out.distances.append(found)
        out.strict_cells.append(tight)
        out.valid.append(_valid(crystal))
    return out


def _reduced(crystal: Crystal, failed: list[str]) -> Reduced | None:
    try:
        return Reduced(crystal, 0)
    except Exception as error:  # as above
        failed.append(f"{crystal.id}: {type(error).__name__}: {error}")
        return None


def _valid(crystal: Crystal) -> bool:
    try:
        return composition_valid(crystal) and structure_valid(crystal)
    except Exception:  # as above
        return False


def answers(questions: Iterable[Question], workers: int) -> list[Answer]:
    """To all questions, in order, by several processes."""
    with Workers(judge, workers) as pool:
        return list(pool.map(questions))


def coverage(questions: Sequence[Question]) -> list[float]:
    """METRe's distances: of each target to the nearest of all that was made of its composition, for
    whichever target; infinite without a match."""
    made: dict[Composition, list[Crystal]] = defaultdict(list)
    for question in questions:
        made[composition_of(question.target)] += question.made
    several = {c for c, group in _by_composition(questions).items() if len(group) > 1}
    out = []
    for question in questions:
        composition = composition_of(question.target)
        if composition in several:
            found = judge(Question(question.target, made[composition]))
            out.append(found.best(len(found.distances)))
        else:
            out.append(math.nan)  # as its own samples alone
    return out


def _by_composition(questions: Sequence[Question]) -> dict[Composition, list[Question]]:
    out: dict[Composition, list[Question]] = defaultdict(list)
    for question in questions:
        out[composition_of(question.target)].append(question)
    return out


COLUMNS = [
    "", "k", "cRMSE", "within 0.1 %", "match %", "RMSE", "METRe %", "match % (0.3/0.2/5)",
    "match % (valid)", "no answer %",
]  # fmt: skip


def rows(name: str, found: Sequence[Answer], covered: Sequence[float], k: int) -> list[object]:
    """A line of the table: k samples of each target."""
    best = np.array([a.best(k) for a in found])
    gated = np.array([a.best(k, gated=True) for a in found])
    tight = np.array([any(a.strict_cells[:k]) for a in found])
    matched = np.isfinite(best)
    penalised = np.where(matched, best, CSP.stol)
    own = [
        a.best(len(a.distances)) if math.isnan(c) else c
        for a, c in zip(found, covered, strict=True)
    ]
    return [
        name,
        str(k),
        _mean(penalised, 1, 4),
        _mean(best < STRICT, 100, 1),
        _mean(matched, 100, 1),
        Number(float(best[matched].mean()) if matched.any() else math.nan, 4),
        _mean(np.isfinite(own), 100, 1),
        _mean(tight, 100, 1),
        _mean(np.isfinite(gated), 100, 1),
        _mean(np.array([len(a.distances) < k for a in found]), 100, 1),
    ]


def _mean(values: np.ndarray, scale: float, places: int) -> Number:
    """With the half-width of its 95 % interval."""
    values = values.astype(float) * scale
    half = 1.96 * values.std() / math.sqrt(len(values))
    return Number(float(values.mean()), places, float(half))


def table(lines: Sequence[list[object]], targets: int) -> Table:
    """The lines as a table, with what its columns mean."""
    notes = [
        f"{targets} targets; ± is the half-width of a 95 % interval over targets. Distances are "
        "root mean square displacements over (volume/atom)^(1/3), by StructureMatcher "
        f"({CSP}); {DEFAULT} is pymatgen's default.",
        f"cRMSE counts a miss as {CSP.stol:g}. The loose match rate says little: random coordinates"
        " reach a high one with many samples. 'valid': CDVAE's gate, composition (smact14) and "
        "structure of sample and target. METRe: targets for which any sample of their composition "
        "matches.",
        "The rows below the model need none: random coordinates in a cube of the volume that the "
        "elements suggest; training structures of the same formula; those of the nearest formula "
        "with elements swapped and the volume scaled.",
    ]
    rows: Any = list(lines)
    return Table("prediction", "Structure prediction", COLUMNS, rows, 2, notes)
