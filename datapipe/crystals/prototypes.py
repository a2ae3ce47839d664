"""SYNTHETIC crystals for demos and tests: known structure types decorated with ions.

The crystals are plausible ionic compounds that nobody made or relaxed, and their labels are what
physics computes from the structure alone. Every id starts with `synthetic-`. Nothing is
downloaded: the structure types are the AFLOW prototypes that pymatgen ships (Mehl et al., Comput.
Mater. Sci. 136, S1, 2017).

How a crystal is made:

1. A structure type with two or three kinds of site gets a composition: ions that balance in charge,
   the anions being the more electronegative elements (the SMACT rules: Davies et al., Chem 1, 617,
   2016). Up to four structure types in a row share a composition, so that the composition alone
   does not give the labels.
2. The cell is scaled until ions of opposite charge touch (radii: Shannon, Acta Cryst. A32, 751,
   1976) and like ions keep their distance. Where the ions would fill too little of the cell, the
   composition does not suit the structure type and is left out.
3. The cell is stretched, all edges by the same -5 % to 20 %. About every second crystal is also
   sheared and its atoms are moved a little, so that it has no symmetry left; the others keep all
   of it.

A crystal depends on (index, seed) alone, so that any number of processes may share the work and
every machine makes the same data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.structure_types import (
    SHARED,
    Ion,
    StructureType,
    charges,
    compositions,
    structure_types,
    usable_ions,
)

UNITS = {"ewald_energy": "eV/atom", "density": "g/cm^3", "volume_per_atom": "A^3/atom"}
"""Unit of each label. `ewald_energy` is the electrostatic energy of the ions as point charges."""

TARGETS = tuple(UNITS)
"""Names of the labels."""

MIN_SIZE, MAX_SIZE = 200, 20_000


_PACKING = 0.3
"""Smallest share of the cell that the ions fill."""
_STRETCH = (0.95, 1.2)
"""Range of the linear stretch of a cell of touching ions."""
_SHEAR = 0.04
"""Largest strain component of a distorted crystal."""
_SHIFT = 0.15
"""Largest displacement of an atom of a distorted crystal along each axis, in Å."""

_G_PER_CM3 = 1.66053906660
"""One dalton per Å³ in g/cm³."""


def prototypes(size: int = 2000, seed: int = 0) -> Iterator[Crystal]:
    """The first `size` synthetic crystals of a seed, labelled with `TARGETS`, in order of index.

    Raises:
        ValueError: a size outside 200..20,000 or a negative seed.
    """
    check_size(size)
    _check_seed(seed)
    return (prototype_crystal(index, seed) for index in range(size))


def check_size(size: int) -> None:
    """Raises ValueError where `prototypes` cannot make so many crystals."""
    if isinstance(size, bool) or not isinstance(size, int) or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(
            f"input=prototypes makes {MIN_SIZE} to {MAX_SIZE} synthetic crystals: "
            f"size={size!r} is not a whole number in this range"
        )


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"the seed must be a whole number from 0 on, got {seed!r}")


def prototype_crystal(index: int, seed: int = 0) -> Crystal:
    """Synthetic crystal number `index`, a pure function of its arguments.

    The first call in a process takes about a second, every other one a few milliseconds.

    Raises:
        ValueError: an index outside 0..19,999 or a negative seed.
    """
    _check_seed(seed)
    if not 0 <= index < MAX_SIZE:
        raise ValueError(f"synthetic crystals are numbered 0..{MAX_SIZE - 1}, got {index}")
    kind, ions = _choice(index, seed)
    rng = np.random.default_rng([seed, index])
    strain = np.eye(3)
    shift: np.ndarray = np.zeros((len(kind.site), 3))
    lattice = kind.lattice * kind.scale(np.array([ion.radius for ion in ions]), charges(ions))
    lattice = lattice * (_STRETCH[0] + rng.random() * (_STRETCH[1] - _STRETCH[0]))
    if rng.random() < 0.5:
        shear = _SHEAR * (2 * rng.random((3, 3)) - 1)
        strain = strain + (shear + shear.T) / 2
        amplitude = _SHIFT * rng.random()
        shift = amplitude * (2 * rng.random(shift.shape) - 1)
    lattice = lattice @ strain
    frac = kind.frac_coords + shift @ np.linalg.inv(lattice)
    numbers = np.array([ion.number for ion in ions])[kind.site]
    crystal = Crystal.create(_id(index, kind, ions), numbers, np.round(frac, 6), lattice)
    # Rounded, so that the last bits of one machine's linear algebra are not in the data.
    crystal = replace(crystal, lattice=np.round(crystal.lattice, 6))
    mass = sum(ions[k].mass for k in kind.site)
    return crystal.with_targets(
        {
            "ewald_energy": ewald_energy(crystal, charges(ions)[kind.site]),
            "density": mass / crystal.volume * _G_PER_CM3,
            "volume_per_atom": crystal.volume / len(crystal),
        }
    )


def ewald_energy(crystal: Crystal, charges: Sequence[int] | np.ndarray) -> float:
    """Electrostatic energy of point charges on the atoms, in eV/atom, to 1e-6 (Ewald's sum).

    Args:
        charges: [n] charge of each atom in units of e; they add up to zero.
    """
    from pymatgen.analysis.ewald import EwaldSummation
    from pymatgen.core import Element, Lattice, Species, Structure

    species = [
        Species(Element.from_Z(int(z)).symbol, int(q))
        for z, q in zip(crystal.numbers, charges, strict=True)
    ]
    structure = Structure(Lattice(crystal.lattice), species, crystal.frac_coords)
    return float(EwaldSummation(structure, acc_factor=8).total_energy) / len(crystal)


class _Pairs(NamedTuple):
    """Every structure type of a formula with every composition that suits it, in drawn order."""

    types: list[StructureType]
    type_index: np.ndarray
    """[M] structure type of each pair."""
    ions: np.ndarray
    """[M, K] ion on each kind of site."""


def _pairs(formula: tuple[int, ...], seed: int) -> _Pairs:
    """Pairs of a formula: the compositions in random order with four structure types each, then
    again with the next four, until all pairs have been named once."""
    types = structure_types()[formula]
    rows = compositions(formula)
    rng = np.random.default_rng([seed, *formula])
    radius = np.array([ion.radius for ion in usable_ions()])
    charge = charges(usable_ions())
    # Sites of equal count may swap their ions: each structure type takes the way that packs best.
    swaps = [p for p in itertools.permutations(range(len(formula))) if _same(formula, p)]
    ways = np.stack([rows[:, p] for p in swaps])
    packing = np.stack([t.packing(radius[ways], charge[ways]) for t in types])  # [types, ways, D]
    best = packing.argmax(1)
    suits = packing.max(1) > _PACKING
    # Rank of each structure type among those that suit a composition, in random order.
    place = np.where(suits, rng.random(suits.shape), 2.0).argsort(0).argsort(0)
    turn = place // SHARED
    t, d = np.nonzero(suits)
    order = np.lexsort((place[t, d], rng.permutation(len(rows))[d], turn[t, d]))
    t, d = t[order], d[order]
    return _Pairs(types, t, ways[best[t, d], d])


def _same(formula: tuple[int, ...], permutation: tuple[int, ...]) -> bool:
    return all(formula[p] == n for p, n in zip(permutation, formula, strict=True))


@lru_cache(maxsize=2)
def _plan(seed: int) -> tuple[dict[tuple[int, ...], _Pairs], list[tuple[int, ...]]]:
    """The pairs of each formula, and the order in which formulas take turns: in one cycle each
    occurs as often as it has structure types."""
    pairs = {formula: _pairs(formula, seed) for formula in structure_types()}
    pairs = {formula: p for formula, p in pairs.items() if len(p.ions)}
    cycle = [f for f, p in pairs.items() for _ in range(len(set(p.type_index.tolist())))]
    order = np.random.default_rng(seed).permutation(len(cycle))
    return pairs, [cycle[i] for i in order]


def _choice(index: int, seed: int) -> tuple[StructureType, tuple[Ion, ...]]:
    """Structure type and ions of a crystal. A pair comes again, with another stretch and
    distortion, only after all pairs of its formula have been used."""
    pairs, cycle = _plan(seed)
    turn, position = divmod(index, len(cycle))
    formula = cycle[position]
    own = pairs[formula]
    rank = turn * cycle.count(formula) + cycle[:position].count(formula)
    row = rank % len(own.ions)
    return own.types[own.type_index[row]], tuple(usable_ions()[i] for i in own.ions[row])


def _id(index: int, kind: StructureType, ions: Sequence[Ion]) -> str:
    """For example `synthetic-000017-CaTiO3-AB3C_cP5_221_a_c_b`: cations first, then anions."""
    order = sorted(range(len(ions)), key=lambda k: (ions[k].charge < 0, ions[k].electronegativity))
    symbols = (f"{ions[k].symbol}{kind.formula[k] if kind.formula[k] > 1 else ''}" for k in order)
    return f"synthetic-{index:06d}-{''.join(symbols)}-{kind.name}"
