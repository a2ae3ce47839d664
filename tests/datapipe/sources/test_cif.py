"""CIF text as pymatgen, ASE and gemmi write it; files of several structures; contradictions."""

import io
from pathlib import Path

import ase.io
import gemmi
import numpy as np
import pytest
from pymatgen.core import Element, Lattice, Structure
from pymatgen.io.cif import CifParser, CifWriter

from crysforge.datapipe.cif import read_cif, read_cifs, structure_names
from crysforge.datapipe.cif.order import BY_ELECTRONEGATIVITY
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from tests.cif_cases import FM3M, NACL, A, block, formula
from tests.layouts import assert_same, cif, make_structure

FILES = Path(__file__).resolve().parents[2] / "data" / "cases"


def snapped(rng: np.random.Generator) -> Structure:
    structure = make_structure(rng)
    frac = structure.frac_coords.copy()
    near = rng.choice([1 / 3, 2 / 3, 0.33333, 0.66667, 0.3334, -1 / 3], frac.shape)
    return Structure(
        structure.lattice, structure.species, np.where(rng.random(frac.shape) < 0.3, near, frac)
    )


@pytest.mark.filterwarnings("ignore:Issues encountered")
@pytest.mark.parametrize("seed", range(40))
def test_p1_is_read_as_pymatgen_reads_it(seed):
    text = cif(snapped(np.random.default_rng(seed)))
    wanted = Crystal.from_pymatgen(CifParser.from_str(text).parse_structures(primitive=False)[0])
    found = read_cif(text)
    assert found.numbers.tolist() == wanted.numbers.tolist()
    np.testing.assert_allclose(found.lattice, wanted.lattice, atol=1e-12)
    gap = np.abs(found.frac_coords - wanted.frac_coords)
    assert np.minimum(gap, 1 - gap).max() < 1e-12


def test_electronegativity_order_is_pymatgens():
    order = BY_ELECTRONEGATIVITY.split()
    known = [e for e in Element if e.symbol in order]
    assert order == [e.symbol for e in sorted(known, key=lambda e: (e.X, e.symbol))]
    assert len(order) == len(known) == len(set(order))


@pytest.mark.parametrize("seed", range(10))
def test_ase_and_gemmi_write_what_is_read(seed):
    structure = make_structure(np.random.default_rng(seed))
    text = io.BytesIO()
    ase.io.write(text, Crystal.from_pymatgen(structure).to_ase(), format="cif")
    assert_same(read_cif(text.getvalue().decode()), structure)
    small = gemmi.SmallStructure()
    small.cell = gemmi.UnitCell(*structure.lattice.parameters)
    small.spacegroup_hm = "P 1"
    for number, site in enumerate(structure):
        one = gemmi.SmallStructure.Site()
        one.label, one.type_symbol = f"{site.specie.symbol}{number}", site.specie.symbol
        one.element = gemmi.Element(site.specie.symbol)
        one.fract, one.occ = gemmi.Fractional(*site.frac_coords), 1.0
        small.add_site(one)
    assert_same(read_cif(small.make_cif_block().as_string()), structure, 1e-4)


@pytest.mark.parametrize(
    ("group", "sites"),
    [
        ("Fm-3m", {"Na": [0, 0, 0], "Cl": [0.5, 0.5, 0.5]}),
        ("P6_3/mmc", {"Mo": [1 / 3, 2 / 3, 0.25], "S": [1 / 3, 2 / 3, 0.621]}),
        ("R-3m", {"Bi": [0, 0, 0.4], "Te": [0, 0, 0.2095]}),
        ("Pnma", {"Ti": [0, 0, 0.5], "Ca": [0.03, 0.25, 0.99]}),
        ("P2_1/c", {"Zr": [0.28, 0.04, 0.21], "O": [0.07, 0.33, 0.34]}),
    ],
)
def test_symmetric_cif_of_pymatgen_is_expanded(group, sites):
    shape = {"F": Lattice.cubic, "R": lambda a: Lattice.hexagonal(a, 24.0)}
    cell = shape.get(group[0], lambda a: Lattice.orthorhombic(a, a + 2, a + 1))(5.6)
    if group.startswith("P6"):
        cell = Lattice.hexagonal(3.2, 12.3)
    structure = Structure.from_spacegroup(group, cell, list(sites), list(sites.values()))
    text = str(CifWriter(structure, symprec=0.01))
    assert_same(read_cif(text), CifParser.from_str(text).parse_structures(primitive=False)[0])


def test_deuterium_is_hydrogen():
    text = cif(Structure(Lattice.cubic(5), ["H", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
    assert sorted(read_cif(text.replace("  H  H0", "  D  D0")).numbers.tolist()) == [1, 17]


TWO = block(FM3M, A, NACL) + "data_powder\n_pd_meas_2theta 5\ndata_b\n" + FM3M + A
BAD = TWO + NACL.replace("Cl", "Zz")


def test_every_structure_of_a_file_is_there():
    assert structure_names(BAD) == ["x", "b"]
    (first, good), (second, bad) = read_cifs(BAD)
    assert (first, second) == ("x", "b")
    assert isinstance(good, Crystal) and len(good) == 8
    assert isinstance(bad, BadCrystal) and "'Zz'" in str(bad)
    with pytest.raises(BadCrystal, match=r"holds 2 structures \(x, b\)"):
        read_cif(BAD)
    assert len(read_cif(BAD, number=0)) == 8
    with pytest.raises(BadCrystal, match="holds no structure"):
        read_cif(block(FM3M, A))


CONTRADICTION = block(formula("Na Cl", 2), "_cell_volume 44.9\n", FM3M, A, NACL)


def test_a_contradiction_is_refused_or_told_with_both_values():
    with pytest.raises(BadCrystal, match=r"Z is 2, but the atoms Na4 Cl4 are 4") as refused:
        read_cif(CONTRADICTION)
    assert "_cell_volume is 44.9 Å³, the cell has 179.43 Å³" in str(refused.value)
    crystal = read_cif(CONTRADICTION, checks="warn")
    assert len(crystal) == 8 and len(crystal.notes) == 2
    assert read_cif(block(FM3M, A, NACL)).notes == ()
    with pytest.raises(ValueError, match="strict or warn"):
        read_cif(CONTRADICTION, checks="lax")


def test_what_is_ambiguous_is_refused_either_way():
    text = block("_space_group_name_H-M_alt 'F d -3 m'\n", A, NACL)
    for checks in ("strict", "warn"):
        with pytest.raises(BadCrystal, match=r"ambiguous: F d -3 m :1 gives .*F d -3 m :2 gives"):
            read_cif(text, checks)


def test_damaged_text_gives_a_crystal_or_says_why():
    rng = np.random.default_rng(0)
    texts = [path.read_text() for path in sorted(FILES.glob("*.*cif"))]
    pieces = [
        "'",
        '"',
        ";",
        "_",
        "loop_",
        "0",
        ".",
        "?",
        "(",
        "1e9",
        "-",
        "nan",
        "#",
        "225",
        "P 1",
        "",
    ]
    for _ in range(1500):
        text = list(rng.choice(texts))
        for place in rng.integers(0, len(text), rng.integers(1, 7)):
            text[place] = str(rng.choice(pieces))
        try:
            assert all(isinstance(c, Crystal | BadCrystal) for _, c in read_cifs("".join(text)))
        except BadCrystal as error:
            assert "\n" not in str(error)
