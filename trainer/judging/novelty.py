"""Crystals of a model's own choice judged: validity, distributions, uniqueness, novelty."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.stats import wasserstein_distance

from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.filters import density
from crysforge.datapipe.preparing.duplicates.matcher import Group, Matcher, Reduced
from crysforge.trainer.generation.known import Known, composition_of
from crysforge.trainer.judging.validity import composition_valid, structure_valid
from crysforge.trainer.reports.formats import Number, Table

MOST_COMPARED = 1000
"""Valid crystals whose distributions are compared, as in the papers."""
SAME = Matcher(stol=0.3, ltol=0.2, angle_tol=5.0)
"""When crystals are the same: pymatgen's own tolerances."""


@dataclass(frozen=True)
class Judged:
    """What is said of one crystal. A check that fails is a no; `why` names it."""

    name: str
    composition: bool
    structure: bool
    density: float
    elements: int
    why: str = ""

    @property
    def valid(self) -> bool:
        return self.composition and self.structure


def judged_one(crystal: Crystal, states: str) -> Judged:
    """Of one crystal, whatever it is."""
    why, found = [], {}
    for name, check in (("composition", partial(composition_valid, states=states)),
                        ("structure", structure_valid)):  # fmt: skip
        try:
            found[name] = bool(check(crystal))
        except Exception as error:  # libraries give up on crystals in more ways than one
            found[name] = False
            why.append(f"{name}: {type(error).__name__}: {error}")
    elements = len(np.unique(crystal.numbers))
    return Judged(crystal.id, **found, density=density(crystal), elements=elements,
                   why="; ".join(why))  # fmt: skip


def judged_all(crystals: Iterable[Crystal], states: str, workers: int) -> list[Judged]:
    """Of all, in order, by several processes."""
    with Workers(partial(judged_one, states=states), workers) as pool:
        return list(pool.map(crystals))


def distinct(crystals: Sequence[Crystal]) -> list[Crystal]:
    """One of each structure, the first."""
    groups: dict[object, Group] = defaultdict(Group)
    out = []
    for number, crystal in enumerate(crystals):
        try:
            reduced = Reduced(crystal, number)
        except Exception:  # as above: nobody can tell, so that it stays
            out.append(crystal)
            continue
        group = groups[composition_of(crystal), reduced.counts]
        if not any(_same(other, reduced) for other in group.nearest(reduced)):
            group.add(reduced)
            out.append(crystal)
    return out


def _same(other: Reduced, new: Reduced) -> bool:
    try:
        return SAME.may_fit(other, new) and SAME.fits(other, new)
    except Exception:  # as above
        return False


def table(
    crystals: Sequence[Crystal],
    failed: int,
    found: Sequence[Judged],
    reference: Sequence[Crystal],
    training: Known,
) -> Table:
    """All rates are of what was asked for, failures among it; uniqueness and novelty are of the
    valid ones."""
    asked = len(crystals) + failed
    valid = [c for c, v in zip(crystals, found, strict=True) if v.valid]
    judged = [v for v in found if v.valid][:MOST_COMPARED]
    unique = distinct(valid)
    new = [c for c in unique if not training.same(c, SAME)]
    real = np.array([[density(c), len(np.unique(c.numbers))] for c in reference])

    def emd(column: int, values: list[float]) -> float:
        return wasserstein_distance(values, real[:, column]) if values else math.nan

    share = {
        "valid %": len(valid),
        "composition %": sum(v.composition for v in found),
        "structure %": sum(v.structure for v in found),
        "unique and valid %": len(unique),
        "new, unique and valid %": len(new),
    }
    columns = ["asked", *share, "density EMD", "elements EMD"]
    row = [
        str(asked),
        *(Number(100 * n / max(asked, 1), 2) for n in share.values()),
        Number(emd(0, [v.density for v in judged]), 4),
        Number(emd(1, [float(v.elements) for v in judged]), 4),
    ]
    notes = [
        f"EMD: Wasserstein distance of {len(judged)} valid crystals to the reference's "
        f"{len(reference)}; density in g/cm³. {failed} came to nothing and count as invalid. New: "
        "no training crystal of the same formula matches at pymatgen's own tolerances.",
    ]
    return Table("generation", "Generated crystals", columns, [row], 1, notes)  # type: ignore[list-item]
