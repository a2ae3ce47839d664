"""POSCAR files as VASP reads them: every form of head, positions and numbers; nothing guessed."""

import numpy as np
import pytest
from pymatgen.io.vasp import Poscar

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.sources.poscar import read_poscar
from tests.layouts import make_structure

SALT = """\
Na Cl
1.0
5.64 0 0
0 5.64 0
0.3 0 5.64
Na Cl
4 4
Direct
0 0 0
0 .5 .5
.5 0 .5
.5 .5 0
.5 .5 .5
.5 0 0
0 .5 0
0 0 .5
"""
HEAD, ROWS = SALT.split("\n")[:8], SALT.split("\n")[8:16]
BESIDE = "\n".join(
    ["salt", *HEAD[1:5], *HEAD[6:]] + [f"{r} {'Na' if i < 4 else 'Cl'}" for i, r in enumerate(ROWS)]
)
"""VASP 4 with the symbols beside the positions."""
WANTED = read_poscar(SALT)


def lines(**changes: str) -> str:
    """The salt with other lines, by number: `l2="5.64"`."""
    found = SALT.split("\n")
    for name, line in changes.items():
        found[int(name[1:]) - 1] = line
    return "\n".join(found)


@pytest.mark.parametrize("seed", range(10))
def test_pymatgens_poscars_are_read_as_pymatgen_reads_them(seed):
    structure = make_structure(np.random.default_rng(seed)).get_sorted_structure()
    for direct in (True, False):
        text = Poscar(structure).get_str(direct=direct, significant_figures=16)
        wanted = Crystal.from_pymatgen(Poscar.from_str(text).structure)
        found = read_poscar(text)
        assert found.numbers.tolist() == wanted.numbers.tolist()
        np.testing.assert_allclose(found.lattice, wanted.lattice, atol=1e-12)
        np.testing.assert_allclose(found.frac_coords, wanted.frac_coords, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        lines(l6="Na Cl ! species", l7="4 4 # how many"),
        lines(l2="1.0D0", l3="5.64d+00 0.D0 0", l5="3.d-1 0 5.64E0"),
        lines(l2="1 ! scale"),
        lines(l2="  -179.406144"),  # the volume
        lines(l2="2 4 8", l3="2.82 0 0", l4="0 1.41 0", l5=".15 0 .705"),
        lines(l6="Na_pv Cl/8a1b2c"),
        lines(l9="0 0 0 T T F Na", l13=".5 .5 .5 Cl"),
        lines(l3="5.64, 0, 0"),
        SALT.replace("Direct", "Selective dynamics\nD").replace("0 0 0\n0", "0 0 0 T F T\n0"),
        SALT.replace("Na Cl\n4", "4"),  # VASP 4
        SALT.replace("Na Cl\n4", "4").replace("Na Cl", "Na4 Cl4  # salt"),
        lines(l6="Na Na Cl", l7="1 3 4"),
        lines(l6="NA cl"),
        BESIDE,
        SALT + "\n0.1 0.1 0.1\n" * 8,  # velocities after an empty line
    ],
)
def test_every_form_is_the_same_crystal(text):
    found = read_poscar(text)
    assert found.numbers.tolist() == WANTED.numbers.tolist()
    np.testing.assert_allclose(found.lattice, WANTED.lattice, atol=1e-6)
    np.testing.assert_allclose(found.frac_coords, WANTED.frac_coords, atol=1e-12)


@pytest.mark.parametrize("scale", ["1.0", "1.5", "-100", "1 2 3"])
def test_cartesian_positions_are_scaled(scale):
    direct = read_poscar(lines(l2=scale))
    vectors = np.array([[5.64, 0, 0], [0, 5.64, 0], [0.3, 0, 5.64]])
    places = [" ".join(map(str, np.array(r.split(), float) @ vectors)) for r in ROWS]
    head = lines(l2=scale, l8="Cartesian").split("\n")[:8]
    found = read_poscar("\n".join([*head, *places]))
    np.testing.assert_allclose(found.lattice, direct.lattice, atol=1e-9)
    gap = found.frac_coords - direct.frac_coords
    assert np.abs(gap - np.rint(gap)).max() < 1e-9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SALT.replace("Na Cl\n4", "4").replace("Na Cl", "rock salt"), "VASP 4.*'rock salt'"),
        (SALT.replace("Na Cl\n4", "4").replace("Na Cl", "Na3 Cl4"), "does not name"),
        (SALT.replace("Na Cl\n4", "4").replace("Na Cl", "Na Cl O"), "does not name"),
        (lines(l6="A B"), "unknown element 'A'"),
        (lines(l6="H.5 Cl"), "unknown element 'H.5'"),
        (lines(l2="0"), "scale factor"),
        (lines(l2="1 1 -1"), "scale factor"),
        (lines(l2="one"), "scale factor"),
        (lines(l3="5.64 0"), "line 3.*3 numbers.*'5.64 0'"),
        (lines(l3="5.64 zero 0"), "line 3.*3 numbers"),
        (lines(l3="5,64 0 0"), "line 3.*3 numbers.*'5,64 0 0'"),
        (lines(l10="0,5 0,5 0"), "3 numbers.*'0,5 0,5 0'"),
        (lines(l7="4"), "2 elements and 1 numbers"),
        (lines(l7="4 four"), "numbers of atoms"),
        (lines(l7="4 5"), "lists|3 numbers"),
        (lines(l7="4 3"), "add up to 7, but there are more"),
        (lines(l8=""), "Direct or Cartesian"),
        (lines(l8="Fractional"), "Direct or Cartesian.*'Fractional'"),
        (lines(l10="0 .5 nan"), "3 numbers"),
        (lines(l9="0 0 0 K"), "Na by its counts, K beside"),
        ("\n".join(SALT.split("\n")[:7]), "neither"),
    ],
)  # fmt: skip
def test_what_vasp_would_misread_is_refused(text, words):
    with pytest.raises(BadCrystal, match=words) as refused:
        read_poscar(text)
    assert "\n" not in str(refused.value)
