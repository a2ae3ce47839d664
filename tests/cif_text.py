"""Crystals of every space-group setting, and CIF text that says them in many ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import gemmi
import numpy as np
from ase.data import chemical_symbols, covalent_radii

from crysforge.datapipe.crystals.crystal import Crystal

SETTINGS = list(gemmi.spacegroup_table_itb())


@dataclass
class Example:
    """A crystal and the asymmetric unit that it came from.

    Attributes:
        entry: gemmi's table entry of its setting.
        lengths, angles: of the cell, in Å and degrees.
        sites: (label, symbol, [3] coordinates) of each site.
        crystal: all atoms of the cell.
        units: formula units in the cell, and `formula` of one.
    """

    entry: gemmi.SpaceGroup
    lengths: list[float]
    angles: list[float]
    sites: list[tuple[str, str, np.ndarray]]
    crystal: Crystal
    formula: Mapping[str, int]
    units: int


def matrices(entry: gemmi.SpaceGroup) -> tuple[np.ndarray, np.ndarray]:
    """[m, 3, 3] rotations and [m, 3] translations, as gemmi has them."""
    operations = list(entry.operations())
    rotations = np.array([op.rot for op in operations]) / gemmi.Op.DEN
    return rotations, np.array([op.tran for op in operations]) / gemmi.Op.DEN


def example(entry: gemmi.SpaceGroup, rng: np.random.Generator, sites: int = 3) -> Example:
    """A random crystal with this symmetry: some sites on special positions, atoms apart."""
    rotations, shifts = matrices(entry)
    lengths, angles = _cell(rotations, rng, len(shifts))
    cell = gemmi.UnitCell(*lengths, *angles)
    lattice = np.array(cell.orth.mat.tolist()).T
    symbols = rng.choice(["Na", "Cl", "Si", "O", "Fe", "C", "S", "Ba"], sites, replace=False)
    chosen: list[tuple[str, str, np.ndarray]] = []
    numbers: list[int] = []
    atoms = np.empty((0, 3))
    for number, symbol in enumerate(symbols):
        for _ in range(200):
            x = rng.random(3)
            if rng.random() < 0.6:
                x = _special(x, rotations, shifts, rng)
            orbit = _orbit(x, rotations, shifts)
            z = gemmi.Element(str(symbol)).atomic_number
            if _apart(np.concatenate([atoms, orbit]), [*numbers, *[z] * len(orbit)], lattice):
                chosen.append((f"{symbol}{number + 1}", str(symbol), x))
                atoms = np.concatenate([atoms, orbit])
                numbers += [z] * len(orbit)
                break
    counts = {s: numbers.count(gemmi.Element(s).atomic_number) for _, s, _ in chosen}
    units = int(np.gcd.reduce(list(counts.values())))
    crystal = Crystal.create("", numbers, atoms, lattice)
    formula = {s: n // units for s, n in counts.items()}
    return Example(entry, lengths, angles, chosen, crystal, formula, units)


def _cell(rotations, rng, order: int) -> tuple[list[float], list[float]]:
    """Lengths and angles that the rotations leave alone, large enough for the orbits."""
    basis = np.eye(3) + rng.uniform(-0.25, 0.25, (3, 3))
    basis *= rng.uniform(0.8, 1.3, 3)[:, None]
    metric = np.mean([r.T @ basis @ basis.T @ r for r in rotations], axis=0)
    metric *= (60.0 * order / np.sqrt(np.linalg.det(metric))) ** (2 / 3)
    lengths = np.sqrt(np.diag(metric))
    cosines = (metric / np.outer(lengths, lengths))[[1, 0, 0], [2, 2, 1]]
    return [round(x, 4) for x in lengths], [round(x, 4) for x in np.degrees(np.arccos(cosines))]


def _special(x, rotations, shifts, rng) -> np.ndarray:
    """A point that an operation maps onto itself."""
    for k in rng.permutation(len(rotations))[:8]:
        points, place = [], x
        for _ in range(6):
            points.append(place)
            place = rotations[k] @ place + shifts[k]
        mean = np.mean(points, axis=0)
        image = rotations[k] @ mean + shifts[k]
        gap = image - mean
        if np.abs(gap - np.rint(gap)).max() < 1e-9 and k > 0:
            return mean
    return x


def _orbit(x, rotations, shifts) -> np.ndarray:
    images = np.einsum("kij,j->ki", rotations, x) + shifts
    images -= np.floor(images)
    keys = np.rint(images * 1e6).astype(np.int64) % 1_000_000
    return images[np.sort(np.unique(keys, axis=0, return_index=True)[1])]


def _apart(atoms: np.ndarray, numbers: list[int], lattice: np.ndarray) -> bool:
    """Whether all atoms are 0.8 of the sum of their covalent radii apart."""
    shifts = np.array(list(np.ndindex(3, 3, 3))) - 1.0
    gap = atoms[:, None] - atoms
    gap -= np.rint(gap)
    square = np.square((gap[:, :, None] + shifts) @ lattice).sum(-1)
    square[np.arange(len(atoms)), np.arange(len(atoms)), 13] = np.inf
    radii = 0.8 * covalent_radii[numbers]
    return bool((square.min(-1) > np.square(radii[:, None] + radii)).all())


def text(
    example: Example,
    *,
    symmetry: Iterable[str] = (),
    operations: bool = False,
    facts: Iterable[str] = (),
    digits: int = 7,
    sites: Iterable[tuple[str, str, np.ndarray]] | None = None,
    types: bool = True,
) -> str:
    """CIF text of an example.

    Args:
        symmetry: lines that name its symmetry. operations: whether its operations are listed.
        facts: of `formula`, `z`, `volume`, `density`.
        sites: other sites than the asymmetric unit's.
    """
    lines = ["data_example", *symmetry]
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    for name, value in zip(names, [*example.lengths, *example.angles], strict=True):
        lines.append(f"_cell_{name} {value}")
    crystal = example.crystal
    said = {
        "formula": f"_chemical_formula_sum '{formula(example.formula)}'",
        "z": f"_cell_formula_units_Z {example.units}",
        "volume": f"_cell_volume {crystal.volume:.2f}",
        "density": f"_exptl_crystal_density_diffrn {_density(crystal):.3f}",
    }
    lines += [said[fact] for fact in facts]
    if operations:
        lines += ["loop_", "_space_group_symop_operation_xyz"]
        lines += [f"'{op.triplet()}'" for op in example.entry.operations()]
    lines += ["loop_", "_atom_site_label", *(["_atom_site_type_symbol"] if types else [])]
    lines += ["_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z"]
    for label, symbol, x in example.sites if sites is None else sites:
        numbers = " ".join(f"{v:.{digits}f}" for v in x)
        lines.append(f"{label} {symbol + ' ' if types else ''}{numbers}")
    return "\n".join(lines) + "\n"


def formula(counts: Mapping[str, int]) -> str:
    return " ".join(f"{symbol}{n if n > 1 else ''}" for symbol, n in counts.items())


def all_sites(crystal: Crystal) -> list[tuple[str, str, np.ndarray]]:
    """Every atom of the cell as a site."""
    symbols = [chemical_symbols[z] for z in crystal.numbers]
    return [
        (f"{s}{i + 1}", s, x)
        for i, (s, x) in enumerate(zip(symbols, crystal.frac_coords, strict=True))
    ]


def _density(crystal: Crystal) -> float:
    from crysforge.datapipe.crystals.filters import density

    return density(crystal)


def largest_gap(found: Crystal, wanted: Crystal) -> float:
    """Å by which the atoms of two crystals in the same setting are apart at most; infinite where
    cells or atoms differ."""
    if sorted(found.numbers) != sorted(wanted.numbers):
        return np.inf
    if not np.allclose(found.lattice, wanted.lattice, atol=2e-3):
        return np.inf
    gap = found.frac_coords[:, None] - wanted.frac_coords
    gap -= np.rint(gap)
    apart = np.linalg.norm(gap @ wanted.lattice, axis=-1)
    apart[found.numbers[:, None] != wanted.numbers] = np.inf
    if len(set(apart.argmin(1).tolist())) < len(found):
        return np.inf
    return float(apart.min(1).max())
