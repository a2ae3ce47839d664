"""The file as its own judge: formula, Z, density and volume against the atoms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from ase.data import atomic_masses
from gemmi import cif

from crysforge.datapipe.cif.blocks import NULLS, Block
from crysforge.datapipe.cif.formula import Formula, in_words, parse_formula
from crysforge.datapipe.cif.groups.operations import SymmetryGroup
from crysforge.datapipe.cif.groups.symbols import settings_of_number
from crysforge.datapipe.crystals.crystal import BadCrystal

CHECKS = ("strict", "warn")
"""What to do with a file that contradicts itself: refuse it, or read it and say so."""

_FORMULAE = (
    "_chemical_formula_sum",
    "_chemical_formula_moiety",
    "_chemical_formula_iupac",
    "_chemical_formula_structural",
)
_DENSITIES = {"_exptl_crystal_density_diffrn": 0.02, "_exptl_crystal_density_meas": 0.15}
"""Density tags and the share by which each may be off."""
_VOLUME = 0.015
_ELECTRONS = 0.03
"""Share by which F000 may differ from the number of electrons: anomalous dispersion."""
_PROBES = ("_diffrn_radiation_probe", "_diffrn_radiation_type")
_PER_CM3 = 1.66053907
"""g/cm³ of one atomic mass unit in one Å³."""

_MODULATED = (
    "_space_group_ssg_",
    "_space_group_symop_ssg_",
    "_cell_wave_vector",
    "_cell_subsystem",
    "_atom_site_displace_",
    "_atom_site_occ_fourier",
    "_atom_site_occ_special",
    "_atom_site_fourier_wave",
    "_jana_cell_modulation",
)
_DIMENSION = ("_cell_modulation_dimension", "_space_group_ssg_superspace_dimension")
_KIND = "_exptl_crystal_type_of_structure"


def refuse_modulated(block: Block) -> None:
    """Raises BadCrystal for a structure that needs a superspace: modulated or composite."""
    for tag in _modulated_tags(block.tags):
        given = next((v for v in block.column(tag) if v not in NULLS), None)
        if given is None or (tag in _DIMENSION and given == "0"):
            continue
        if tag == _KIND and not given.strip("'\"").lower().startswith(("mod", "comp")):
            continue
        raise BadCrystal(
            f"the structure is modulated ({tag} {given[:40]}): no cell repeats it", "modulated"
        )


@lru_cache(maxsize=1024)
def _modulated_tags(tags: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(t for t in tags if t.startswith(_MODULATED) or t in _DIMENSION or t == _KIND)


@dataclass
class StatedFacts:
    """What a file says of its cell beside the atoms."""

    formula: Formula | None = None
    units: float | None = None
    """Z: formula units in the cell."""
    volume: tuple[float, float] | None = None
    """Å³ and how far it may be off."""
    densities: list[tuple[str, float, float]] = field(default_factory=list)
    """Tag, g/cm³, how far it may be off."""
    mass: float | None = None
    """Mass of a formula unit, where there is no formula."""
    electrons: float | None = None
    """Electrons in the cell (F000 of X-rays), where there is no formula."""


@dataclass(frozen=True)
class Doubt:
    """A remark that needs the formula's word.

    Attributes:
        numbers: the elements that a label may stand for, or none.
        hydrogens: whether hydrogen atoms are said to be somewhere.
    """

    words: str
    numbers: tuple[int, ...] = ()
    hydrogens: bool = False

    def is_settled(self, verdict: Verdict, facts: StatedFacts) -> bool:
        """Whether the facts that agree with the atoms leave no doubt: a formula (that has hydrogen,
        where there should be some), or, between several elements, Z or density."""
        if self.hydrogens and not (facts.formula and 1 in facts.formula.elements):
            return False
        return verdict.formula or (len(self.numbers) > 1 and verdict.content)


@dataclass
class Verdict:
    """What the facts say of a set of atoms.

    Attributes:
        problems: contradictions, each with both values.
        formula: whether a formula agrees.
        content: whether the number of atoms in the cell is confirmed, by Z or density.
    """

    problems: list[str]
    formula: bool = False
    content: bool = False


def facts_of(block: Block) -> StatedFacts:
    """What a block says of its cell."""
    facts = StatedFacts()
    for text in block.values(*_FORMULAE):
        if (formula := parse_formula(text)) is not None:
            facts.formula = formula
            break
    facts.units = _number(block, "_cell_formula_units_z")
    if (volume := block.value("_cell_volume")) is not None:
        value = cif.as_number(volume)
        if np.isfinite(value) and value > 0:
            facts.volume = value, _VOLUME * value + _last_digit(volume)
    for tag, share in _DENSITIES.items():
        density = _number(block, tag)
        if density is not None:
            error = share * density + _last_digit(block.value(tag) or "")
            facts.densities.append((tag, density, error))
    if facts.formula is None:
        facts.mass = _number(block, "_chemical_formula_weight")
        probe = " ".join(block.values(*_PROBES)).lower()
        if "neutron" not in probe and "electron" not in probe:
            facts.electrons = _number(block, "_exptl_crystal_f_000")
    return facts


def _number(block: Block, tag: str) -> float | None:
    text = block.value(tag)
    value = cif.as_number(text) if text else float("nan")
    return value if np.isfinite(value) and value > 0 else None


def _last_digit(text: str) -> float:
    return 10.0 ** -len(text.partition(".")[2].partition("(")[0])


def judge(facts: StatedFacts, atoms: Mapping[int, int], volume: float) -> Verdict:
    """Holds the atoms of a cell (by atomic number) and its volume in Å³ against the facts."""
    verdict = Verdict([])
    if facts.volume and abs(facts.volume[0] - volume) > facts.volume[1]:
        verdict.problems.append(
            f"_cell_volume is {facts.volume[0]:g} Å³, the cell has {volume:.2f} Å³"
        )
    mass = sum(float(atomic_masses[z]) * n for z, n in atoms.items())
    if facts.formula is not None:
        _judge_formula(facts, facts.formula, atoms, verdict)
    elif facts.mass and facts.units:
        if abs(facts.mass * facts.units / mass - 1) > 0.01:
            verdict.problems.append(
                f"{facts.units:g} formula units of mass {facts.mass:g} make "
                f"{facts.mass * facts.units:.1f}, the atoms have {mass:.1f}"
            )
        else:
            verdict.content = True
    electrons = sum(z * n for z, n in atoms.items())
    if facts.electrons is not None:
        if abs(facts.electrons / electrons - 1) > _ELECTRONS:
            verdict.problems.append(
                f"_exptl_crystal_F_000 is {facts.electrons:g}, the atoms {in_words(atoms)} have "
                f"{electrons} electrons"
            )
        else:
            verdict.content = True
    density = mass * _PER_CM3 / volume
    for tag, value, error in facts.densities:
        if all(abs(value * u - density) > error * u for u in (1, 1e-3)):  # or in kg/m³
            verdict.problems.append(
                f"{tag} is {value:g} g/cm³, the atoms {in_words(atoms)} make {density:.3g} g/cm³"
            )
        else:
            verdict.content = True
    return verdict


def _judge_formula(
    facts: StatedFacts, formula: Formula, atoms: Mapping[int, int], verdict: Verdict
) -> None:
    units = formula.multiple(atoms)
    if units is None:
        verdict.problems.append(
            f"the formula is {formula.text!r}, the atoms of the cell are {in_words(atoms)}"
        )
        return
    verdict.formula = True
    if facts.units is None:
        return
    # pymatgen and ASE write the formula of the whole cell.
    whole = abs(units - 1) < 0.01 and all(n % facts.units == 0 for n in atoms.values())
    if abs(units / facts.units - 1) < 0.02 or whole:
        verdict.content = True
    else:
        verdict.problems.append(
            f"Z is {facts.units:g}, but the atoms {in_words(atoms)} are {units:g} formula units of "
            f"{formula.text!r}"
        )


def judge_multiplicity(given: list[str], found: list[int], group: SymmetryGroup) -> str | None:
    """What the multiplicities of the sites contradict; None if they agree: as numbers of images in
    the cell or in that of the conventional lattice, or as orders of the sites' own symmetry (which
    older programs wrote)."""
    values = [cif.as_number(v) for v in given]
    if values == found or len(values) != len(found) or not np.isfinite(values).all():
        return None
    times = lattice_points(group)
    if times > 1 and values == [n * times for n in found]:
        return None
    if all(v * n == len(group) for v, n in zip(values, found, strict=True)):
        return None
    place = next(i for i, n in enumerate(found) if values[i] != n)
    return f"the multiplicity of site {place + 1} is {given[place]}, it has {found[place]} images"


@lru_cache(maxsize=512)
def lattice_points(group: SymmetryGroup) -> float:
    """How many times the conventional cell of a group's type is as large as the cell it is in."""
    settings = settings_of_number(group.number)
    if len(group) == 1 or not settings:
        return 1
    own = (group.rotations == np.eye(3)).all((1, 2)).sum()
    return {"P": 1, "R": 3, "F": 4}.get(settings[0].hm[0], 2) / float(own)
