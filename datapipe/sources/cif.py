"""CIF text to crystals: a fast reader of the P1 dialect that pymatgen writes (CDVAE's files, GNoME,
Materials Project), and pymatgen for every other CIF."""

from __future__ import annotations

import re

import numpy as np
from ase.data import atomic_numbers

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.limits import check_images

_SYMMETRY = """\
loop_
 _symmetry_equiv_pos_site_id
 _symmetry_equiv_pos_as_xyz
  1  'x, y, z'
loop_
 _atom_site_type_symbol
 _atom_site_label
 _atom_site_symmetry_multiplicity
 _atom_site_fract_x
 _atom_site_fract_y
 _atom_site_fract_z
 _atom_site_occupancy
"""
_CELL = re.compile(r"^_cell_(?:length|angle)_(\w+)\s+(\S+)$", re.MULTILINE)
_P1 = re.compile(r"^_symmetry_Int_Tables_number\s+1$", re.MULTILINE)
_PARAMETERS = {"a", "b", "c", "alpha", "beta", "gamma"}
_IDEAL = (1 / 3, 2 / 3)
_IDEAL_TOLERANCE = 1e-4
_BY_ELECTRONEGATIVITY = """
Fr Cs K Rb Ba Ra Na Sr Li Ca Ac La Tb Yb Ce Pm Pr Nd Sm Eu Gd Dy Y Ho Er Tm Lu Pu Am Bk
Cf Cm Es Fm Hf Lr Md No Th Mg Zr Np Sc U Pa Ta Ti Mn Be Nb Al Tl V Zn Cr Cd In Ga Fe Co
Cu Re Si Tc Ni Ag Sn Hg Po Ge Bi B Sb Te Mo As P At H Ir Os Pd Rn Ru Pt Rh Pb W Au C Se
S Xe I Br Kr N Cl O F
"""
"""Symbols by Pauling electronegativity, then by name, as pymatgen sorts them (a test compares);
importing pymatgen for it would take longer than reading a thousand files."""
_ELEMENTS = {
    symbol: (rank, atomic_numbers[symbol])
    for rank, symbol in enumerate(_BY_ELECTRONEGATIVITY.split())
}


def read_cif(text: str) -> Crystal:
    """The one crystal in a CIF.

    As pymatgen does, coordinates within 1e-4 (relative) of 1/3 and 2/3 become exactly that, and
    atoms are sorted by electronegativity.

    Raises:
        BadCrystal: no structure or several, partial occupancy, unknown element, nonsense.
    """
    return _read_p1(text) or _read_any(text)


def _read_p1(text: str) -> Crystal | None:
    """Reads the dialect; None if the text is anything else, however slightly."""
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    head, found, sites = text.partition(_SYMMETRY)
    if not found or "loop_" in head or head.count("data_") != 1 or not _P1.search(head):
        return None
    cell = dict(_CELL.findall(head))
    fields = sites.split()
    if set(cell) != _PARAMETERS or not fields or len(fields) % 7:
        return None
    if set(fields[6::7]) - {"1", "1.0"}:
        return None
    try:
        rank, numbers = zip(*[_ELEMENTS[symbol] for symbol in fields[::7]], strict=True)
        frac = np.array([fields[3::7], fields[4::7], fields[5::7]], dtype=np.float64).T
        lengths = [float(cell[k]) for k in ("a", "b", "c")]
        angles = [float(cell[k]) for k in ("alpha", "beta", "gamma")]
    except (KeyError, ValueError):
        return None
    order = np.argsort(rank, kind="stable")
    for ideal in _IDEAL:
        frac[np.abs(frac / ideal - 1) <= _IDEAL_TOLERANCE] = ideal
    return Crystal.create("", np.array(numbers)[order], frac[order], lattice(lengths, angles))


def lattice(lengths: list[float], angles: list[float]) -> np.ndarray:
    """[3, 3] cell vectors in Å from lengths in Å and angles in degrees."""
    a, b, c = lengths
    radians = np.radians(angles)
    cos, sin = np.cos(radians), np.sin(radians)
    x = cos[2]
    y = sin[2]
    if abs(y) < 1e-6:
        raise BadCrystal(f"the cell is flat: gamma is {angles[2]} degrees")
    z1 = cos[1]
    z2 = (cos[0] - cos[1] * cos[2]) / y
    height = 1 - z1**2 - z2**2
    if height <= 0:
        raise BadCrystal(f"no cell has the angles {angles}")
    return np.array([[a, 0, 0], [b * x, b * y, 0], [c * z1, c * z2, c * np.sqrt(height)]])


def _read_any(text: str) -> Crystal:
    """Reads any CIF with pymatgen."""
    from pymatgen.core import Element
    from pymatgen.io.cif import CifParser

    parser = CifParser.from_str(text)
    for block in parser._cif.data.values():
        for symbol in block.data.get("_atom_site_type_symbol", ()):
            letters = re.match("[A-Za-z]*", symbol)[0]  # type: ignore[index]
            if not Element.is_valid_symbol(letters.title()):
                raise BadCrystal(f"unknown element {symbol!r}", "unknown element")
        if sites := block.data.get("_atom_site_label"):
            check_images(len(parser.get_symops(block)), len(sites))
    try:
        structures = parser.parse_structures(primitive=False, on_error="raise")
    except ValueError as error:
        if "Occupancy" in str(error):
            raise BadCrystal(
                "partial occupancy: sites at one place have occupancies that sum to more than 1",
                "partial occupancy",
            ) from None
        raise
    if len(structures) != 1:
        raise BadCrystal(f"the CIF holds {len(structures)} structures: give each its own")
    structure = structures[0]
    if "implicit_hydrogens" in structure.site_properties:
        raise BadCrystal("the CIF implies hydrogen atoms without coordinates: add them")
    return Crystal.from_pymatgen(structure)
