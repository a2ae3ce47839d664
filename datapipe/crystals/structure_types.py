"""AFLOW's structure types, and the ions that may sit on their sites."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

_IONS = {
    1: "Li Na K Rb Cs Ag Tl",
    2: "Mg Ca Sr Ba Mn Fe Co Cu Zn Cd Pb",
    3: "Al Sc Fe Ga Y In La Nd Gd Er Lu Bi",
    4: "Si Ti Ge Zr Sn Hf Pb Th",
    -1: "F Cl Br I",
    -2: "O S Se Te",
}
"""Elements by charge: common oxidation states whose radii are known."""


_MAX_ATOMS = 40


SHARED = 4
"""Structure types in a row that share a composition."""


_LIKE = 0.95
"""Ions of like charge stay apart by this share of the sum of their radii,"""


_LIKE_FLOOR = 2.2
"""and by at least so many Å."""


class Ion(NamedTuple):
    symbol: str
    number: int
    charge: int
    radius: float
    mass: float
    electronegativity: float


@dataclass(frozen=True)
class StructureType:
    """A prototype. Its kinds of site (letters K) are numbered by rising count."""

    name: str
    lattice: np.ndarray
    frac_coords: np.ndarray
    site: np.ndarray
    """[n] kind of each site."""
    formula: tuple[int, ...]
    """[K] sites of each kind in the formula unit, rising."""
    contact: np.ndarray
    """[K, K] shortest distance between sites of two kinds in Å."""

    def scale(self, radius: np.ndarray, charge: np.ndarray) -> np.ndarray:
        """Factor on all lengths at which the ions touch; radius and charge [..., K] → [...]."""
        touch = radius[..., :, None] + radius[..., None, :]
        like = charge[..., :, None] * charge[..., None, :] > 0
        needed = np.where(like, np.maximum(_LIKE * touch, _LIKE_FLOOR), touch)
        return (needed / self.contact).max((-2, -1))

    def packing(self, radius: np.ndarray, charge: np.ndarray) -> np.ndarray:
        """Share of the scaled cell that the ions fill; radius and charge [..., K] → [...]."""
        filled = 4 / 3 * np.pi * (radius**3 * np.bincount(self.site)).sum(-1)
        cell = abs(np.linalg.det(self.lattice)) * self.scale(radius, charge) ** 3
        return filled / cell


@lru_cache(maxsize=1)
def usable_ions() -> tuple[Ion, ...]:
    from pymatgen.core import Element

    return tuple(
        Ion(e.symbol, e.Z, charge, float(e.ionic_radii[charge]), float(e.atomic_mass), float(e.X))
        for charge, symbols in _IONS.items()
        for e in map(Element, symbols.split())
    )


def charges(ions: Sequence[Ion]) -> np.ndarray:
    return np.array([ion.charge for ion in ions])


@lru_cache(maxsize=1)
def structure_types() -> dict[tuple[int, ...], list[StructureType]]:
    """Prototypes of two or three elements and at most 40 atoms, by formula."""
    out = defaultdict(list)
    for entry in _aflow():
        sites = entry["snl"]["sites"]
        symbols = [site["species"][0]["element"] for site in sites]
        count = Counter(symbols)  # keeps the order of first appearance
        if len(count) not in (2, 3) or len(sites) > _MAX_ATOMS:
            continue
        order = sorted(count, key=count.__getitem__)
        site = np.array([order.index(symbol) for symbol in symbols])
        unit = int(np.gcd.reduce(list(count.values())))
        formula = tuple(count[symbol] // unit for symbol in order)
        lattice = np.array(entry["snl"]["lattice"]["matrix"])
        frac = np.array([s["abc"] for s in sites])
        contact = _contact(lattice, frac, site)
        name = entry["tags"]["aflow"]
        out[formula].append(StructureType(name, lattice, frac, site, formula, contact))
    return dict(sorted(out.items()))


def _aflow() -> list[dict]:
    """pymatgen's prototypes as plain JSON (importing its module would build them all)."""
    spec = importlib.util.find_spec("pymatgen.analysis")
    folders = (spec.submodule_search_locations if spec else None) or ()
    for path in (p for folder in folders for p in Path(folder).rglob("aflow_prototypes.json*")):
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    raise ValueError("the installed pymatgen lacks aflow_prototypes.json: pymatgen>=2025.1 has it")


def _contact(lattice: np.ndarray, frac: np.ndarray, site: np.ndarray) -> np.ndarray:
    """[K, K] shortest distance between sites of two kinds, periodic images included."""
    step = frac[:, None] - frac
    images = np.array(list(itertools.product(range(-2, 3), repeat=3)))
    vectors = ((step - np.round(step))[:, :, None] + images) @ lattice
    distance = np.linalg.norm(vectors, axis=-1)
    distance[distance < 1e-6] = np.inf  # a site and itself
    nearest = distance.min(-1)
    kinds = range(site.max() + 1)
    return np.array([[nearest[np.ix_(site == a, site == b)].min() for b in kinds] for a in kinds])


def compositions(formula: tuple[int, ...]) -> np.ndarray:
    """[D, K] rows of `usable_ions()` that balance in charge on a formula, one per composition."""
    ions = usable_ions()
    charge = charges(ions)
    negativity = np.array([ion.electronegativity for ion in ions])
    number = np.array([ion.number for ion in ions])
    rows = np.stack(np.meshgrid(*[np.arange(len(ions))] * len(formula), indexing="ij"), -1)
    rows = rows.reshape(-1, len(formula))
    rows = rows[(charge[rows] * formula).sum(1) == 0]
    anion = charge[rows] < 0
    keep = np.where(anion, negativity[rows], np.inf).min(1) > np.where(
        anion, -np.inf, negativity[rows]
    ).max(1)
    for a, b in itertools.combinations(range(len(formula)), 2):
        keep &= number[rows[:, a]] != number[rows[:, b]]
        if formula[a] == formula[b]:  # which of the two is where is the structure type's choice
            keep &= rows[:, a] < rows[:, b]
    return rows[keep]
