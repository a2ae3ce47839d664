"""CIF text to crystals: never another crystal than the file means, else an error that says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product

import numpy as np

from crysforge.datapipe.cif.blocks import Block, structure_blocks
from crysforge.datapipe.cif.cell import Parameters, lattice_for, misfit, read_parameters
from crysforge.datapipe.cif.checks import (
    CHECKS,
    Doubt,
    StatedFacts,
    facts_of,
    judge,
    judge_multiplicity,
    refuse_modulated,
)
from crysforge.datapipe.cif.choice import Attempt, choose
from crysforge.datapipe.cif.formula import in_words
from crysforge.datapipe.cif.geometry import has_symmetry, merge_copies
from crysforge.datapipe.cif.groups.symbols import settings_of_number
from crysforge.datapipe.cif.order import ELECTRONEGATIVITY_RANK
from crysforge.datapipe.cif.sites import Sites, expand, plain, read_sites
from crysforge.datapipe.cif.species import Species, species_of
from crysforge.datapipe.cif.symmetry import Candidate, Symmetry, symmetry_of
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.limits import check_atoms

_MOST_READINGS = 64
"""Ways to read ambiguous labels that are tried."""
_EQUAL = 2e-4
"""Difference of two misfits that are the same: 0.01° of a right angle."""
_FULL = 1e-3
"""How far an occupancy may be from 1."""


def read_cif(text: str, checks: str = "strict", number: int | None = None) -> Crystal:
    """The one crystal in a CIF, or the one with this number (from 0) among its structures.

    As pymatgen does, coordinates within 1e-4 (relative) of 1/3 and 2/3 become exactly that, and
    atoms are sorted by electronegativity.

    Args:
        checks: "strict" refuses what contradicts itself; "warn" reads it by its most trusted
            statement and says so in `Crystal.notes`. What is ambiguous is refused either way.

    Raises:
        BadCrystal: no structure or several, disorder, unknown elements or symmetry, contradictions,
            nonsense; says what was found.
    """
    blocks = structure_blocks(text)
    if number is not None:
        blocks = blocks[number : number + 1]
    if len(blocks) != 1:
        names = ", ".join(block.name for block in blocks[:5])
        raise BadCrystal(
            f"the CIF holds {len(blocks)} structures ({names}): read it as a file of its own, "
            "which gives all of them, or make a file of each"
        )
    return _read(blocks[0], checks)


def read_cifs(text: str, checks: str = "strict") -> list[tuple[str, Crystal | BadCrystal]]:
    """All structures in a CIF: names of their data blocks, and crystals or why there is none."""
    found: list[tuple[str, Crystal | BadCrystal]] = []
    for block in structure_blocks(text):
        try:
            found.append((block.name, _read(block, checks)))
        except BadCrystal as error:
            found.append((block.name, error))
    return found


def structure_names(text: str) -> list[str]:
    """Names of the data blocks of a CIF that list atoms."""
    return [block.name for block in structure_blocks(text)]


def _read(block: Block, checks: str) -> Crystal:
    if checks not in CHECKS:
        raise ValueError(f"checks must be strict or warn, got {checks!r}")
    refuse_modulated(block)
    sites = read_sites(block)
    facts = facts_of(block)
    species = _species(block, sites, facts)
    if sites.occupancy is not None:  # disorder is what to say first
        _full_sites(sites, np.array([s.numbers[0] for s in species]))
    symmetry = symmetry_of(block)
    parameters = read_parameters(block)
    attempts = list(_attempts(sites, species, facts, symmetry, parameters))
    if not attempts:
        names = ", ".join(c.name for c in symmetry.candidates[:4])
        lengths, angles = parameters
        cell = f"a, b, c = {lengths}, angles {angles}"
        raise BadCrystal(f"the space group {names} does not fit the cell ({cell})", "symmetry")
    return choose(attempts, checks)


def _species(block: Block, sites: Sites, facts: StatedFacts) -> list[Species]:
    """[n] what each site may be.

    Raises:
        BadCrystal: a site is no element, or none that the formula has.
    """
    allowed = facts.formula.elements if facts.formula else None
    if allowed is None and (listed := block.column("_atom_type_symbol")):
        kinds = [species_of("", symbol.strip("'\""), None) for symbol in listed]
        if all(kind.sure for kind in kinds):
            allowed = frozenset(kind.numbers[0] for kind in kinds)
    if sites.types and all(sites.types):
        by_type = {t: species_of("", t, allowed) for t in set(sites.types)}
        species = [by_type[t] for t in sites.types]
    else:
        types = sites.types or [""] * len(sites)
        labels = [plain(label) for label in sites.labels] or [""] * len(sites)
        species = [species_of(a, b, allowed) for a, b in zip(labels, types, strict=True)]
    for one in set(species):
        if not one.numbers:
            known = f" that the formula {facts.formula.text!r} has" if facts.formula else ""
            raise BadCrystal(f"{one.words} is no element{known}", "unknown element")
    return species


def _attempts(
    sites: Sites,
    species: list[Species],
    facts: StatedFacts,
    symmetry: Symmetry,
    parameters: Parameters,
) -> Iterator[Attempt]:
    """One for each group that fits the cell and each way to read the labels.

    Raises:
        BadCrystal: the only group, or all that fit, make nonsense of the sites.
    """
    doubtful = {s.key: s for s in species if not s.sure}
    doubts = list(sites.doubts)
    doubts += [
        Doubt(f"{s.words} may be more than an element", s.numbers) for s in doubtful.values()
    ]
    readings = list(islice(product(*(s.numbers for s in doubtful.values())), _MOST_READINGS))
    failed, any_good = [], False
    for candidate, cell in _fitting(symmetry, parameters):
        for reading in readings:
            numbers, words = [s.numbers[0] for s in species], ""
            if doubtful:
                said = dict(zip(doubtful, reading, strict=True))
                numbers = [said.get(s.key, z) for s, z in zip(species, numbers, strict=True)]
                words = ", ".join(f"{key} as {in_words({z: 1})}" for key, z in said.items())
            try:
                merged = _full_sites(sites, np.array(numbers))
                crystal, problems = _expanded(*merged, facts, symmetry, candidate, cell, doubts)
            except BadCrystal as error:
                failed.append(error)
                continue
            any_good = True
            yield Attempt(candidate, words, crystal, problems)
    if failed and not any_good:
        raise failed[0]


def _fitting(symmetry: Symmetry, parameters: Parameters) -> list[tuple[Candidate, np.ndarray]]:
    """The candidates that fit the cell, and the cell vectors; of several, those that fit best: a
    beta of 90.3° says which axis is unique. A short monoclinic symbol means unique axis a only
    where the cell says so."""
    found = [
        (candidate, cell)
        for candidate in symmetry.candidates
        if (cell := lattice_for(parameters, candidate.group)) is not None
    ]
    if len(found) < 2:
        return found
    gaps = [misfit(cell, c.group) for c, cell in found]
    best = [one for one, gap in zip(found, gaps, strict=True) if gap <= min(gaps) + _EQUAL]
    usual = [(c, cell) for c, cell in best if c.setting and not c.setting.has_unique_a]
    return usual if symmetry.named and usual else best


def _expanded(
    sites: Sites,
    numbers: np.ndarray,
    facts: StatedFacts,
    symmetry: Symmetry,
    candidate: Candidate,
    cell: np.ndarray,
    doubts: list[Doubt],
) -> tuple[Crystal, list[str]]:
    """The crystal by one group and one reading, and what contradicts it."""
    index, frac = expand(sites, candidate.group, cell)
    numbers = numbers[index]
    index, numbers, frac, copies = merge_copies(index, numbers, frac, cell)
    check_atoms(len(index))
    order = np.argsort(ELECTRONEGATIVITY_RANK[numbers], kind="stable")
    crystal = Crystal.create("", numbers[order], frac[order], cell)
    atoms = Counter(numbers.tolist())
    verdict = judge(facts, atoms, float(cell[0, 0] * cell[1, 1] * cell[2, 2]))
    problems = [*symmetry.problems, *verdict.problems]
    for doubt in doubts:
        if not doubt.is_settled(verdict, facts):
            problems.append(f"{doubt.words}, and no formula settles it")
    if sites.multiplicity and not copies and not symmetry.magnetic:
        found = np.bincount(index, minlength=len(sites)).tolist()
        wrong = judge_multiplicity(sites.multiplicity, found, candidate.group)
        problems += [wrong] if wrong else []
    problems += _against_name(symmetry, candidate, crystal, verdict.content)
    return crystal, problems


def _against_name(
    symmetry: Symmetry, candidate: Candidate, crystal: Crystal, confirmed: bool
) -> list[str]:
    """What a symbol or number contradicts that stands beside operations of another group.

    The atoms may have the symmetry that is named all the same, as where all are listed with `x,y,z`
    alone. And it may be less than that of the operations, if the cell's content confirms these.
    """
    number, group = symmetry.number, candidate.group
    if not symmetry.from_operations or number in (None, group.number) or not group.number:
        return []
    order = len(settings_of_number(number)[0].group.point_group)
    if order < len(group.point_group):
        agree = confirmed
    else:
        agree = has_symmetry(crystal, number, symmetry.named)
    if agree:
        return []
    atoms = in_words(Counter(crystal.numbers.tolist()))
    return [
        f"the operations are those of {candidate.name}, but the file says {symmetry.words}, a "
        f"symmetry that the atoms {atoms} do not have"
    ]


def _full_sites(sites: Sites, numbers: np.ndarray) -> tuple[Sites, np.ndarray]:
    """Sites of one element in one place as one.

    Raises:
        BadCrystal: a place that is not fully occupied by one element.
    """
    if sites.occupancy is None:
        return sites, numbers
    keep = np.ones(len(sites), dtype=bool)
    for i in np.flatnonzero(np.abs(sites.occupancy - 1) > _FULL):
        if not keep[i]:
            continue
        gap = sites.frac - sites.frac[i]
        here = np.flatnonzero((np.abs(gap - np.rint(gap)) < 1e-3).all(1))
        total = sites.occupancy[here].sum()
        if len(set(numbers[here].tolist())) > 1 or abs(total - 1) > 5 * _FULL:
            shown = ", ".join(f"{sites.name(j)}: {sites.occupancy[j]:g}" for j in here)
            raise BadCrystal(
                f"partial occupancy at site {i} ({shown}): give an ordered structure (for example "
                "by pymatgen's OrderDisorderedStructureTransformation)",
                "partial occupancy",
            )
        keep[here[1:]] = False
    kept = np.flatnonzero(keep)
    return replace(sites.take(kept), occupancy=None), numbers[kept]
