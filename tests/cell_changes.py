"""Materials with lattices of every kind, and ten cells of each: made with pymatgen and spglib,
which share no code with what is tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from pymatgen.core import Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
from scipy.spatial.transform import Rotation


def _pseudo_cubic() -> Structure:
    """A lattice with 48 operations, atoms with one."""
    sites = [[0.02, 0.01, 0.03], [0.5, 0.52, 0.47], [0.5, 0.5, 0.0], [0.49, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(Lattice.cubic(3.95), ["Sr", "Ti", "O", "O", "N"], sites)


def _made(group: str, lattice: Lattice, symbols: list[str], sites: list[list[float]]) -> Structure:
    return Structure.from_spacegroup(group, lattice, symbols, sites)


MATERIALS: Mapping[str, Callable[[], Structure]] = {
    "rocksalt": lambda: _made(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    ),
    "bcc iron": lambda: _made("Im-3m", Lattice.cubic(2.87), ["Fe"], [[0, 0, 0]]),
    "pyrite": lambda: _made(
        "Pa-3", Lattice.cubic(5.42), ["Fe", "S"], [[0, 0, 0], [0.385, 0.385, 0.385]]
    ),
    "wurtzite": lambda: _made(
        "P6_3mc", Lattice.hexagonal(3.25, 5.21), ["Zn", "O"],
        [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.38]],
    ),
    "quartz": lambda: _made(
        "P3_221", Lattice.hexagonal(4.91, 5.40), ["Si", "O"],
        [[0.47, 0, 2 / 3], [0.4133, 0.2672, 0.7855]],
    ),
    "bismuth telluride": lambda: _made(
        "R-3m", Lattice.hexagonal(4.38, 30.5), ["Bi", "Te", "Te"],
        [[0, 0, 0.4], [0, 0, 0], [0, 0, 0.2095]],
    ),
    "ThCr2Si2 type": lambda: _made(
        "I4/mmm", Lattice.tetragonal(3.96, 13.0), ["Ba", "Fe", "As"],
        [[0, 0, 0], [0.5, 0, 0.25], [0, 0, 0.354]],
    ),
    "orthorhombic, face-centred": lambda: _made(
        "Fddd", Lattice.orthorhombic(10.46, 12.87, 24.49), ["S"], [[0.856, 0.953, 0.952]]
    ),
    "monoclinic, centred": lambda: _made(
        "C2/m", Lattice.monoclinic(12.2, 3.04, 5.8, 103.8), ["Ga", "Ga", "O", "O", "O"],
        [[0.09, 0, 0.795], [0.341, 0, 0.686], [0.167, 0, 0.109], [0.496, 0, 0.256],
         [0.827, 0, 0.436]],
    ),
    "pseudo-cubic": _pseudo_cubic,
    "triclinic": lambda: Structure(
        Lattice.from_parameters(4.1, 5.3, 6.2, 81, 98, 105), ["K", "V", "O", "O"],
        [[0.1, 0.2, 0.3], [0.6, 0.7, 0.1], [0.4, 0.1, 0.8], [0.9, 0.5, 0.6]],
    ),
}  # fmt: skip


def _rotated(s: Structure, rng: np.random.Generator) -> Structure:
    turn = Rotation.random(random_state=rng).as_matrix()
    return Structure(s.lattice.matrix @ turn.T, s.species, s.frac_coords)


def _shifted(s: Structure, rng: np.random.Generator) -> Structure:
    return Structure(s.lattice, s.species, s.frac_coords + rng.uniform(-2, 2, 3))


def _permuted(s: Structure, rng: np.random.Generator) -> Structure:
    order = rng.permutation(len(s))
    return Structure(s.lattice, [s.species[i] for i in order], s.frac_coords[order])


def _sheared(s: Structure, rng: np.random.Generator) -> Structure:
    basis = np.array([[1, 2, -1], [0, 1, 3], [0, 0, 1]])[rng.permutation(3)]
    return Structure(basis @ s.lattice.matrix, s.species, s.frac_coords @ np.linalg.inv(basis))


def _left_handed(s: Structure, rng: np.random.Generator) -> Structure:
    axes = [1, 0, 2]
    return Structure(s.lattice.matrix[axes], s.species, s.frac_coords[:, axes])


def _analyzer(s: Structure) -> SpacegroupAnalyzer:
    return SpacegroupAnalyzer(s, symprec=0.01)


CHANGES: Mapping[str, Callable[[Structure, np.random.Generator], Structure]] = {
    "primitive": lambda s, _: _analyzer(s).get_primitive_standard_structure(),
    "conventional": lambda s, _: _analyzer(s).get_conventional_standard_structure(),
    "2×1×1": lambda s, _: s.make_supercell((2, 1, 1), in_place=False),
    "2×2×2": lambda s, _: s.make_supercell((2, 2, 2), in_place=False),
    "rotated": _rotated,
    "shifted": _shifted,
    "permuted": _permuted,
    "Niggli": lambda s, _: s.get_reduced_structure("niggli"),
    "sheared basis": _sheared,
    "left-handed basis": _left_handed,
}
"""What changes the cell and not the material."""


@cache
def cells_of(material: str) -> dict[str, Structure]:
    """The ten cells of a material, by what was changed."""
    structure, rng = MATERIALS[material](), np.random.default_rng(0)
    return {name: change(structure, rng) for name, change in CHANGES.items()}
