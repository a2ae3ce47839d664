"""The atom sites of a CIF, and all atoms of the cell from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from gemmi import cif

from crysforge.datapipe.cif.blocks import NULLS, QUOTES, Block
from crysforge.datapipe.cif.checks import Doubt
from crysforge.datapipe.cif.geometry import squares
from crysforge.datapipe.cif.groups.operations import SymmetryGroup
from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.crystals.limits import check_images

_FRACT = ("_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z")
_ONES = {"1", "1.0", "1.", "1.00", "1.000", "1.0000", *NULLS}
_IDEAL = np.array([1 / 3, 2 / 3]).reshape(2, 1, 1)
_IDEAL_TOLERANCE = 1e-4

_EXACT = 1e-3
"""Å between images of a site that are the same for sure."""
_NOTHING = 1e-9
"""Å by which images of a site on a special position are apart for rounding in the machine."""
_APART = 0.25
"""Å between images of a site that are never the same."""


@dataclass
class Sites:
    """The asymmetric unit.

    Attributes:
        labels: [n] as they stand in the file; an empty list where it has none.
        types: [n] text, empty where a value is missing; an empty list where the file has none.
        frac: [n, 3].
        raw: three columns of coordinates as they stand in the file.
        occupancy: [n], or None where all are 1.
        multiplicity: [n] as the file says, or empty.
        doubts: remarks of the file that only a formula which agrees can settle.
    """

    labels: list[str]
    types: list[str]
    frac: np.ndarray
    raw: tuple[list[str], ...]
    occupancy: np.ndarray | None
    multiplicity: list[str]
    doubts: list[Doubt] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.frac)

    def name(self, site: int) -> str:
        """The label of a site, for messages."""
        return repr(plain(self.labels[site])) if self.labels else f"number {site + 1}"

    def take(self, kept: np.ndarray | list[int]) -> Sites:
        """These sites alone."""
        return replace(
            self,
            labels=[self.labels[i] for i in kept] if self.labels else [],
            types=[self.types[i] for i in kept] if self.types else [],
            frac=self.frac[kept],
            raw=tuple([column[i] for i in kept] for column in self.raw),
            occupancy=None if self.occupancy is None else self.occupancy[kept],
            multiplicity=[self.multiplicity[i] for i in kept] if self.multiplicity else [],
        )


def read_sites(block: Block) -> Sites:
    """The sites of a block. Coordinates within 1e-4 (relative) of 1/3 and 2/3 become that.

    Raises:
        BadCrystal: no fractional coordinates, or one that is no number; disorder.
    """
    raw = tuple([block.column(tag) for tag in _FRACT])
    n = len(raw[0])
    if not n or len(raw[1]) != n or len(raw[2]) != n:
        raise BadCrystal(
            "the CIF has no fractional coordinates (_atom_site_fract_x, _y, _z)", "unreadable"
        )
    sites = Sites(
        _column(block, n, "_atom_site_label"),
        _text(_column(block, n, "_atom_site_type_symbol")),
        _numbers(raw),
        raw,
        _occupancy(block, n),
        _column(block, n, "_atom_site_site_symmetry_multiplicity")
        or _column(block, n, "_atom_site_symmetry_multiplicity"),
    )
    _check_disorder(block, sites)
    known = np.isfinite(sites.frac).all()
    sites = _atoms(block, sites, bool(known))
    if not known and not np.isfinite(sites.frac).all():
        i, axis = np.argwhere(~np.isfinite(sites.frac))[0]
        raise BadCrystal(
            f"atom {sites.name(i)} has no {'xyz'[axis]} coordinate: found {sites.raw[axis][i]!r}",
            "no coordinates",
        )
    near = np.abs(sites.frac / _IDEAL - 1) <= _IDEAL_TOLERANCE
    if near.any():
        for ideal, places in zip(_IDEAL.ravel(), near, strict=True):
            sites.frac[places] = ideal
    return sites


def _column(block: Block, n: int, tag: str) -> list[str]:
    """[n] raw values; empty where the sites have none."""
    column = block.column(tag)
    return column if len(column) == n else []


def _text(column: list[str]) -> list[str]:
    words = {raw: plain(raw) for raw in set(column)}
    return [words[raw] for raw in column]


def plain(raw: str) -> str:
    """A raw value without quotes; empty for `.` and `?`."""
    if raw in NULLS:
        return ""
    return cif.as_string(raw).strip() if raw.startswith(QUOTES) else raw


def _occupancy(block: Block, n: int) -> np.ndarray | None:
    """[n], or None where all are 1."""
    column = _column(block, n, "_atom_site_occupancy")
    if not set(column) - _ONES:
        return None
    values = np.array([1.0 if v in NULLS else cif.as_number(v) for v in column])
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if len(bad):
        raise BadCrystal(f"the occupancy of site {bad[0] + 1} is {column[bad[0]]!r}")
    return values


def _atoms(block: Block, sites: Sites, known: bool) -> Sites:
    """The sites that are atoms, without dummies, empty sites and rows that hold nothing.

    Args:
        known: whether all coordinates are numbers.
    """
    n, doubts = len(sites), sites.doubts
    flags = _column(block, n, "_atom_site_calc_flag")
    gone = {i for i, flag in enumerate(flags) if flag.lower() == "dum"}
    if gone:
        names = ", ".join(map(sites.name, sorted(gone)))
        doubts.append(Doubt(f"the file marks {names} as dummy atoms"))
    if sites.occupancy is not None and not sites.occupancy.all():
        absent = np.flatnonzero(sites.occupancy == 0).tolist()
        doubts.append(Doubt(f"the occupancy of {', '.join(map(sites.name, absent))} is 0"))
        gone |= set(absent)
    if not known:
        named = [plain(label) for label in sites.labels] or [""] * n
        gone |= {i for i in range(n) if not named[i] and all(c[i] in NULLS for c in sites.raw)}
    hydrogens = _column(block, n, "_atom_site_attached_hydrogens")
    for i, count in enumerate(hydrogens):
        if i not in gone and count not in (*NULLS, "0"):
            words = f"the file attaches {count} hydrogen atoms to {sites.name(i)}"
            doubts.append(Doubt(words, hydrogens=True))
    if not gone:
        return sites
    if len(gone) == n:
        raise BadCrystal("the CIF lists no atoms", "no structure")
    return replace(sites.take([i for i in range(n) if i not in gone]), multiplicity=[])


def _check_disorder(block: Block, sites: Sites) -> None:
    """Raises BadCrystal for alternative positions of one atom, with no word of their occupancy."""
    groups = _column(block, len(sites), "_atom_site_disorder_group")
    assemblies = _column(block, len(sites), "_atom_site_disorder_assembly")
    found: dict[str, set[str]] = {}
    for i, group in enumerate(groups):
        partial = sites.occupancy is not None and sites.occupancy[i] < 0.999
        if group in (*NULLS, "0") or partial:
            continue
        same = found.setdefault(assemblies[i] if assemblies else ".", set())
        same.add(group)
        if group.startswith("-") or len(same) > 1:
            raise BadCrystal(
                f"{sites.name(i)} is one of several alternatives (disorder group {group}), but no "
                "occupancy says so: keep one of them",
                "disorder",
            )


def _numbers(raw: tuple[list[str], ...]) -> np.ndarray:
    """[n, 3] coordinates; NaN for what is no number."""
    try:
        return np.array(raw, dtype=np.float64).T
    except ValueError:
        return np.array([[_coordinate(v) for v in column] for column in raw]).T


def _coordinate(text: str) -> float:
    """A number, with a standard uncertainty or as a fraction; NaN for anything else."""
    text = text.strip("'\"")
    top, slash, bottom = text.partition("/")
    if slash:
        return cif.as_number(top) / (cif.as_number(bottom) or np.nan)
    return cif.as_number(text)


def expand(sites: Sites, group: SymmetryGroup, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All atoms of the cell.

    A site whose images fall together within the precision of its coordinates is moved onto the
    special position that they share.

    Returns:
        [N] index of each atom's site, [N, 3] coordinates.

    Raises:
        BadCrystal: more than `limits.images` images, or some that fall together without a pattern.
    """
    n, m = len(sites), len(group)
    check_images(m, n)
    if m == 1:
        return np.arange(n), sites.frac
    images = _images(sites.frac, group)
    delta = images - sites.frac[:, None]
    delta -= np.rint(delta)
    square = squares(delta, cell)
    near = square < _APART**2
    if np.count_nonzero(near) == n:  # each is its own image alone
        return np.repeat(np.arange(n), m), images.reshape(-1, 3)
    same = square < _EXACT**2
    if np.count_nonzero(near) > np.count_nonzero(same):
        same = square < np.square(_tolerance(sites, cell))[:, None]
    if square[same].max() > _NOTHING**2:
        mean = np.einsum("nm,nmx->nx", same, delta) / same.sum(1)[:, None]
        images = _images(sites.frac + mean, group)
    chosen = []
    for i in range(n):
        cosets = group.cosets(same[i])
        if cosets is None:
            nearest = np.sqrt(square[i][square[i] > _EXACT**2].min())
            raise BadCrystal(
                f"images of {sites.name(i)} are {nearest:.2f} Å apart: it is neither on a special "
                "position nor off it"
            )
        chosen.append(cosets + i * m)
    index = np.concatenate(chosen)
    return index // m, images.reshape(-1, 3)[index]


def _images(frac: np.ndarray, group: SymmetryGroup) -> np.ndarray:
    """[n, m, 3]."""
    return (frac @ group.stacked).reshape(len(frac), -1, 3) + group.translations


def _tolerance(sites: Sites, cell: np.ndarray) -> np.ndarray:
    """[n] Å within which images of a site are the same: two units of its last digit along every
    edge, but not more than `_APART`."""
    digits = [[_decimals(text) for text in column] for column in sites.raw]
    unit = 10.0 ** -np.max(digits, axis=0).astype(float)
    edge = np.linalg.norm(cell, axis=1).max()
    return np.clip(2 * unit * edge, 0.01, _APART)


def _decimals(text: str) -> int:
    return len(text.partition(".")[2].partition("(")[0].strip("'\""))
