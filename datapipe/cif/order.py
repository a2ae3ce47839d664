"""The order of atoms by Pauling electronegativity, as pymatgen sorts them."""

from __future__ import annotations

import numpy as np
from ase.data import atomic_numbers

from crysforge.datapipe.crystals.crystal import MAX_Z

BY_ELECTRONEGATIVITY = """
Fr Cs K Rb Ba Ra Na Sr Li Ca Ac La Tb Yb Ce Pm Pr Nd Sm Eu Gd Dy Y Ho Er Tm Lu Pu Am Bk
Cf Cm Es Fm Hf Lr Md No Th Mg Zr Np Sc U Pa Ta Ti Mn Be Nb Al Tl V Zn Cr Cd In Ga Fe Co
Cu Re Si Tc Ni Ag Sn Hg Po Ge Bi B Sb Te Mo As P At H Ir Os Pd Rn Ru Pt Rh Pb W Au C Se
S Xe I Br Kr N Cl O F
"""
"""Symbols by Pauling electronegativity, then by name, as pymatgen sorts them (a test compares);
importing pymatgen for it would take longer than reading a thousand files."""


def _ranks() -> np.ndarray:
    order = BY_ELECTRONEGATIVITY.split()
    order += sorted(s for s, z in atomic_numbers.items() if z and s not in order)
    ranks = np.zeros(MAX_Z + 1, dtype=np.int64)
    for rank, symbol in enumerate(order):
        ranks[atomic_numbers[symbol]] = rank
    return ranks


ELECTRONEGATIVITY_RANK = _ranks()
"""[119] place in the order by atomic number; elements without electronegativity come last."""
