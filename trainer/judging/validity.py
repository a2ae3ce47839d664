"""Whether a generated crystal can be one: the checks of CDVAE and DiffCSP.

Composition: some usual oxidation states balance, and no anion is less electronegative than a
cation. Structure: no two atoms closer than 0.5 Å, and a volume of 0.1 Å³ at least.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache

from ase.data import atomic_numbers

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.trainer.generation.files import shortest_distance
from crysforge.trainer.judging.config import OXIDATION

LEAST_DISTANCE, LEAST_VOLUME = 0.5, 0.1
"""Å and Å³."""
MOST_COMBINATIONS = 10_000_000
"""Of oxidation states; a composition with more is taken for invalid, as in DiffCSP."""

# The oxidation states that SMACT calls smact14 (Davies et al., J. Open Source Softw. 4, 1361, 2019;
# MIT licence), after Greenwood and Earnshaw: element, then its states.
_SMACT14 = """
H-1+1 He Li+1 Be+1+2 B+1+2+3 C-4-3-2-1+1+2+3+4 N-3-2-1+1+2+3+4+5 O-2-1+1+2 F-1 Ne Na-1+1
Mg+1+2 Al+1+2+3 Si-4-3-2-1+1+2+3+4 P-3-2-1+1+2+3+4+5 S-2-1+1+2+3+4+5+6 Cl-1+1+2+3+4+5+6+7 Ar
K-1+1 Ca+1+2 Sc+1+2+3 Ti-1+1+2+3+4 V-1+1+2+3+4+5 Cr-2-1+1+2+3+4+5+6 Mn-3-2-1+1+2+3+4+5+6+7
Fe-2-1+1+2+3+4+5+6 Co-1+1+2+3+4+5 Ni-1+1+2+3+4 Cu+1+2+3+4 Zn+1+2 Ga+1+2+3 Ge-4-3-2-1+1+2+3+4
As-3+1+2+3+5 Se-2+1+2+4+6 Br-1+1+2+3+4+5+7 Kr+2 Rb-1+1 Sr+1+2 Y+1+2+3 Zr+1+2+3+4
Nb-1+1+2+3+4+5 Mo-2-1+1+2+3+4+5+6 Tc-3-1+1+2+3+4+5+6+7 Ru-2+1+2+3+4+5+6+7+8 Rh-1+1+2+3+4+5+6
Pd+1+2+4+6 Ag+1+2+3+4 Cd+1+2 In+1+2+3 Sn-4+2+4 Sb-3+3+5 Te-2+2+4+5+6 I-1+1+3+4+5+7
Xe+1+2+4+6+8 Cs-1+1 Ba+2 La+2+3 Ce+2+3+4 Pr+2+3+4 Nd+2+3+4 Pm+2+3 Sm+2+3 Eu+2+3 Gd+1+2+3
Tb+1+2+3+4 Dy+2+3+4 Ho+2+3 Er+2+3 Tm+2+3 Yb+2+3 Lu+3 Hf+2+3+4 Ta-1+2+3+4+5 W-2-1+1+2+3+4+5+6
Re-3-1+1+2+3+4+5+6+7 Os-2-1+1+2+3+4+5+6+7+8 Ir-2-1+1+2+3+4+5+6+7+8 Pt-2-1+1+2+3+4+5+6
Au-1+1+2+3+5 Hg+1+2+4 Tl-1+1+3 Pb-4+2+4 Bi-3+1+3+5+7 Po-2+2+4+5+6 At-1+1+3+5+7 Rn+2+6 Fr+1
Ra+2 Ac+2+3 Th+2+3+4 Pa+2+3+4+5 U+2+3+4+5+6 Np+3+4+5+6+7 Pu+3+4+5+6+7+8 Am+2+3+4+5+6+7
Cm+2+3+4+6+8 Bk+2+3+4 Cf+2+3+4 Es+2+3+4 Fm+2+3 Md+2+3 No+2+3 Lr+3 Rf+4 Db+5 Sg+6 Bh+7 Hs+8
"""
SETS: Mapping[str, str] = dict(zip(OXIDATION, (_SMACT14, ""), strict=True))
"""Sets of oxidation states by name; `icsd` are those that pymatgen lists as occurring there."""


@cache
def oxidation_states(name: str) -> dict[int, tuple[int, ...]]:
    """States by atomic number. Raises ValueError for an unknown set."""
    if name not in SETS:
        raise ValueError(f"unknown set of oxidation states {name!r}: {nearest(name, SETS)}")
    if name == "icsd":
        from pymatgen.core import Element

        elements = (Element.from_Z(z) for z in range(1, 104))
        return {e.Z: tuple(e.icsd_oxidation_states or e.common_oxidation_states) for e in elements}
    out = {}
    for word in SETS[name].split():
        symbol = re.match(r"[A-Z][a-z]?", word)
        assert symbol is not None
        states = re.findall(r"[+-]\d", word)
        out[atomic_numbers[symbol[0]]] = tuple(int(s) for s in states)
    return out


def composition_valid(crystal: Crystal, states: str = "smact14") -> bool:
    """Whether the composition is charge balanced: pure elements and alloys of metals always are."""
    counts = Counter(crystal.numbers.tolist())
    divisor = math.gcd(*counts.values())
    return _valid(tuple(sorted((z, n // divisor) for z, n in counts.items())), states)


@lru_cache(maxsize=100_000)
def _valid(formula: tuple[tuple[int, int], ...], name: str) -> bool:
    from pymatgen.core import Element

    elements = [Element.from_Z(z) for z, _ in formula]
    if len(formula) == 1 or all(e.symbol in _metals() for e in elements):
        return True
    table = oxidation_states(name)
    states = [table.get(z, ()) for z, _ in formula]
    if math.prod(map(len, states)) > MOST_COMBINATIONS:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not every element has one
        negativity = [e.X for e in elements]
    return any(
        sum(s * n for s, (_, n) in zip(charges, formula, strict=True)) == 0
        and _ordered(charges, negativity)
        for charges in itertools.product(*states)
    )


def _ordered(charges: Sequence[int], negativity: Sequence[float]) -> bool:
    """Whether every anion is more electronegative than every cation; true where one is unknown."""
    if any(math.isnan(x) for x in negativity):
        return True
    cations = [x for x, s in zip(negativity, charges, strict=True) if s > 0]
    anions = [x for x, s in zip(negativity, charges, strict=True) if s < 0]
    return not cations or not anions or max(cations) < min(anions)


@cache
def _metals() -> frozenset[str]:
    """Symbols that SMACT counts as metals: all but nonmetals, halogens, noble gases, metalloids
    that bond covalently."""
    from pymatgen.core import Element

    others = {"H", "B", "C", "Si", "N", "P", "As", "O", "S", "Se", "Te", "F", "Cl", "Br", "I", "At"}
    others |= {"He", "Ne", "Ar", "Kr", "Xe", "Rn"}
    return frozenset(Element.from_Z(z).symbol for z in range(1, 104)) - others


def structure_valid(crystal: Crystal) -> bool:
    """Whether its atoms are apart, their own images aside, and its cell holds them."""
    if crystal.volume < LEAST_VOLUME:
        return False
    return shortest_distance(crystal, images=False) >= LEAST_DISTANCE
