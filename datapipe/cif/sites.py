"""The atom sites of a CIF, and all atoms of the cell from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from gemmi import cif

from crysforge.datapipe.cif.blocks import Block
from crysforge.datapipe.cif.operations import Group
from crysforge.datapipe.crystals.crystal import BadCrystal

MAX_ATOMS = 20_000
"""Atoms of the largest cell that is read."""
_MAX_IMAGES = 400_000

_FRACT = ("_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z")
_NULLS = ("?", ".", "")
_IDEAL = (1 / 3, 2 / 3)
_IDEAL_TOLERANCE = 1e-4

_EXACT = 1e-3
"""Å between images of a site that are the same for sure."""
_APART = 0.25
"""Å between images of a site that are never the same."""


@dataclass
class Sites:
    """The asymmetric unit.

    Attributes:
        labels, types: [n] text; types are empty where the file has none.
        frac: [n, 3].
        raw: three columns of coordinates as they stand in the file.
        occupancy: [n].
        multiplicity: [n] as the file says, or empty.
        doubts: remarks of the file that only a formula which agrees can settle.
    """

    labels: list[str]
    types: list[str]
    frac: np.ndarray
    raw: tuple[list[str], ...]
    occupancy: np.ndarray
    multiplicity: list[str]
    doubts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


def read_sites(block: Block) -> Sites:
    """The sites of a block. Coordinates within 1e-4 (relative) of 1/3 and 2/3 become that.

    Raises:
        BadCrystal: no fractional coordinates, or one that is no number; disorder.
    """
    raw = tuple(block.column(tag) for tag in _FRACT)
    if not all(raw):
        raise BadCrystal(
            "the CIF has no fractional coordinates (_atom_site_fract_x, _y, _z)", "no structure"
        )
    n = len(raw[0])
    if len({len(column) for column in raw}) > 1:
        raise BadCrystal("the CIF gives x, y and z in loops of unequal length")
    labels = _text(block, n, "_atom_site_label")
    types = _text(block, n, "_atom_site_type_symbol")
    occupancy = _occupancy(block, n, labels)
    keep, doubts = _kept(block, n, labels, occupancy, raw)
    frac = _coordinates(raw, labels, keep)
    if len(keep) < n:
        labels, types = [labels[i] for i in keep], [types[i] for i in keep]
        raw = tuple([column[i] for i in keep] for column in raw)
        occupancy = occupancy[keep]
    for ideal in _IDEAL:
        frac[np.abs(frac / ideal - 1) <= _IDEAL_TOLERANCE] = ideal
    multiplicity = block.column(
        "_atom_site_site_symmetry_multiplicity", "_atom_site_symmetry_multiplicity"
    )
    if multiplicity and (len(multiplicity) != n or len(keep) < n):
        multiplicity = []
    return Sites(labels, types, frac, raw, occupancy, multiplicity, doubts)


def _text(block: Block, n: int, tag: str) -> list[str]:
    column = block.column(tag)
    if len(column) != n:
        return [""] * n
    return ["" if v in _NULLS else v if v[0] not in "'\";" else cif.as_string(v) for v in column]


def _occupancy(block: Block, n: int, labels: list[str]) -> np.ndarray:
    """[n]; 1 where the file has none."""
    column = block.column("_atom_site_occupancy")
    if len(column) != n:
        return np.ones(n)
    if all(value in ("1", "1.0", "1.") for value in column):
        return np.ones(n)
    values = np.array([1.0 if v in _NULLS else cif.as_number(v) for v in column])
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if len(bad):
        raise BadCrystal(f"the occupancy of {labels[bad[0]]!r} is {column[bad[0]]!r}")
    return values


def _kept(
    block: Block, n: int, labels: list[str], occupancy: np.ndarray, raw: tuple[list[str], ...]
) -> tuple[list[int], list[str]]:
    """Indices of the sites that are atoms, and doubts.

    Raises:
        BadCrystal: alternative positions of one atom, with no word of their occupancy.
    """
    doubts = []
    flags = block.column("_atom_site_calc_flag")
    dummy = {i for i, flag in enumerate(flags) if flag.lower() == "dum"} if len(flags) == n else ()
    if dummy:
        doubts.append(f"the file marks {', '.join(labels[i] for i in dummy)} as dummy atoms")
    absent = set(np.flatnonzero(occupancy == 0).tolist()) if not occupancy.all() else ()
    if absent:
        doubts.append(f"the file gives {', '.join(labels[i] for i in absent)} the occupancy 0")
    blank = {i for i in range(n) if not labels[i] and all(c[i] in _NULLS for c in raw)}
    keep = [i for i in range(n) if i not in dummy and i not in absent and i not in blank]
    if not keep:
        raise BadCrystal("the CIF lists no atoms", "no structure")
    hydrogens = block.column("_atom_site_attached_hydrogens")
    for i in keep if len(hydrogens) == n else ():
        if hydrogens[i] not in (*_NULLS, "0"):
            doubts.append(f"the file attaches {hydrogens[i]} hydrogen atoms to {labels[i]}")
    _check_disorder(block, n, labels, occupancy)
    return keep, doubts


def _check_disorder(block: Block, n: int, labels: list[str], occupancy: np.ndarray) -> None:
    groups = block.column("_atom_site_disorder_group")
    assemblies = block.column("_atom_site_disorder_assembly")
    if len(groups) != n:
        return
    found: dict[str, set[str]] = {}
    for i, group in enumerate(groups):
        if group in (*_NULLS, "0") or occupancy[i] < 0.999:
            continue
        assembly = assemblies[i] if len(assemblies) == n else "."
        found.setdefault(assembly, set()).add(group)
        if group.startswith("-") or len(found[assembly]) > 1:
            raise BadCrystal(
                f"{labels[i]!r} is one of several alternatives (disorder group {group}), but no "
                "occupancy says so: keep one of them",
                "disorder",
            )


def _coordinates(raw: tuple[list[str], ...], labels: list[str], keep: list[int]) -> np.ndarray:
    columns = raw if len(keep) == len(raw[0]) else tuple([c[i] for i in keep] for c in raw)
    try:
        frac = np.array(columns, dtype=np.float64).T
    except ValueError:
        frac = np.array([[_coordinate(v) for v in column] for column in columns]).T
    bad = ~np.isfinite(frac)
    if bad.any():
        i, axis = np.argwhere(bad)[0]
        given = columns[axis][i]
        raise BadCrystal(
            f"atom {labels[keep[i]]!r} has no {'xyz'[axis]} coordinate: found {given!r}",
            "no coordinates",
        )
    return frac


def _coordinate(text: str) -> float:
    """A number, with a standard uncertainty or as a fraction; NaN for anything else."""
    text = text.strip("'\"")
    top, slash, bottom = text.partition("/")
    if slash:
        return cif.as_number(top) / cif.as_number(bottom) if bottom not in ("0", "") else np.nan
    return cif.as_number(text)


def expand(sites: Sites, group: Group, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All atoms of the cell.

    A site whose images fall together within the precision of its coordinates is moved onto the
    special position that they share.

    Returns:
        [N] index of each atom's site, [N, 3] coordinates.

    Raises:
        BadCrystal: more than `MAX_ATOMS` atoms, or images that fall together without a pattern.
    """
    n, m = len(sites), len(group)
    if m == 1:
        _check_count(n)
        return np.arange(n), sites.frac
    if n * m > _MAX_IMAGES:
        _check_count(n * m)
    frac = sites.frac
    delta = _images(frac, group) - frac[:, None]
    delta -= np.rint(delta)
    apart = np.sqrt(np.square(delta @ cell).sum(-1))
    same = apart < _EXACT
    if ((apart < _APART) & ~same).any():
        same = apart < _tolerance(sites, cell)[:, None]
    count = same.sum(1)
    if (count == 1).all():
        _check_count(n * m)
        return np.repeat(np.arange(n), m), _images(frac, group).reshape(-1, 3)
    frac = frac + (delta * same[..., None]).sum(1) / count[:, None]
    chosen = []
    for i in range(n):
        cosets = group.cosets(same[i])
        if cosets is None:
            raise BadCrystal(
                f"images of {sites.labels[i]!r} are {apart[i][apart[i] > _EXACT].min():.2f} Å "
                "apart: it is neither on a special position nor off it"
            )
        chosen.append(i * m + cosets)
    index = np.concatenate(chosen)
    _check_count(len(index))
    return index // m, _images(frac, group).reshape(-1, 3)[index]


def _images(frac: np.ndarray, group: Group) -> np.ndarray:
    """[n, m, 3]."""
    turned = frac @ group.rotations.reshape(-1, 3).T
    return turned.reshape(len(frac), -1, 3) + group.translations


def _check_count(count: int) -> None:
    if count > MAX_ATOMS:
        raise BadCrystal(f"the cell would hold {count} atoms, more than {MAX_ATOMS}", "too large")


def _tolerance(sites: Sites, cell: np.ndarray) -> np.ndarray:
    """[n] Å within which images of a site are the same: two units of its last digit along every
    edge, but not more than `_APART`."""
    digits = [[_decimals(text) for text in column] for column in sites.raw]
    unit = 10.0 ** -np.max(digits, axis=0).astype(float)
    edge = np.linalg.norm(cell, axis=1).max()
    return np.clip(2 * unit * edge, 0.01, _APART)


def _decimals(text: str) -> int:
    return len(text.partition(".")[2].partition("(")[0].strip("'\""))
