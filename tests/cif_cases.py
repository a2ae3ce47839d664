"""CIF texts as programs and people write them, each with the crystal that it means: formula of the
cell and space group, or `refuse`."""

from __future__ import annotations

from collections import Counter

import gemmi
import spglib
from ase.data import chemical_symbols

from crysforge.datapipe.crystals.crystal import Crystal

Cases = dict[str, tuple[str, str]]
SALT = "Na4 Cl4|225"


def in_short(crystal: Crystal) -> str:
    """`Na4 Cl4|225`: formula of the cell, elements in the order of the atoms, and space group."""
    cell = crystal.lattice, crystal.frac_coords, crystal.numbers
    found = spglib.get_symmetry_dataset(cell, symprec=0.02)
    atoms = Counter(chemical_symbols[z] for z in crystal.numbers)
    return f"{' '.join(f'{s}{n}' for s, n in atoms.items())}|{found.number}"


def is_as_wanted(found: str, wanted: str) -> bool:
    """Whether they agree, whatever the order of the elements."""
    both = [sorted(one.replace("|", " |").split()) for one in (found, wanted)]
    return both[0] == both[1]


def cell(*values: float) -> str:
    """Tags of a cell: a, or a b c, or a b c with three angles."""
    lengths = values[:3] if len(values) > 1 else values * 3
    angles = values[3:] or (90, 90, 90)
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    return "".join(f"_cell_{n} {v}\n" for n, v in zip(names, (*lengths, *angles), strict=True))


def sites(*rows: str, types: bool = True, more: str = "") -> str:
    """The loop of atoms: label, type symbol if there are `types`, x, y, z, and one tag more."""
    tags = ["label", *(["type_symbol"] if types else []), "fract_x", "fract_y", "fract_z"]
    tags += [more] if more else []
    return "\n".join(["loop_", *(f"_atom_site_{tag}" for tag in tags), *rows, ""])


def symbol(text: str) -> str:
    return f"_symmetry_space_group_name_H-M '{text}'\n"


def operations(*triplets: str) -> str:
    return "\n".join(["loop_", "_symmetry_equiv_pos_as_xyz", *(f"'{t}'" for t in triplets), ""])


def triplets_of(name: str) -> list[str]:
    return [op.triplet() for op in gemmi.find_spacegroup_by_name(name).operations()]


def formula(text: str, units: int | None = None) -> str:
    z = f"_cell_formula_units_Z {units}\n" if units else ""
    return f"_chemical_formula_sum '{text}'\n{z}"


A = cell(5.6402)
NACL = sites("Na1 Na 0 0 0", "Cl1 Cl .5 .5 .5")
ALL = sites(
    *(f"Na Na {xyz}" for xyz in ("0 0 0", ".5 .5 0", ".5 0 .5", "0 .5 .5")),
    *(f"Cl Cl {xyz}" for xyz in (".5 .5 .5", "0 0 .5", "0 .5 0", ".5 0 0")),
)
FM3M = symbol("F m -3 m")
XYZ = operations("x,y,z")
SILICON = cell(5.431) + sites("Si1 Si 0 0 0")
SILICON_2 = cell(5.431) + sites("Si1 Si .125 .125 .125")
MONOCLINIC = cell(6, 7, 8, 90, 95, 90)
ZNS = sites("Zn1 Zn .1 .2 .3", "S1 S .35 .25 .1")
HEXAGONAL = cell(4.386, 4.386, 30.497, 90, 90, 120)
BITE = sites("Bi1 Bi 0 0 .4", "Te1 Te 0 0 0", "Te2 Te 0 0 .2095")
RHOMBOHEDRAL = cell(10.473, 10.473, 10.473, 24.17, 24.17, 24.17)
BITE_R = sites("Bi1 Bi .4 .4 .4", "Te1 Te 0 0 0", "Te2 Te .2095 .2095 .2095")
BRUCITE = cell(3.142, 3.142, 4.766, 90, 90, 120) + operations(*triplets_of("P -3 m 1"))
MGOH = "Mg1 O2 H2|164"
CUBE = symbol("P m -3 m") + cell(4.1)


def block(*parts: str) -> str:
    return "data_x\n" + "".join(parts)


def symbols() -> Cases:
    """Symbols in any spelling, with origins and axes."""
    found: Cases = {}
    for text in (
        "F m -3 m", "Fm3m", "F 4/m -3 2/m", "FM-3M", "f m -3 m", "F_m_-3_m", "F m 3 m", "Fm-3m S",
        "Fm-3m (No. 225)", "F m -3 m (225)", "F m -3 m :1", "F m -3 m {no remark}", "Fm3-m", "225",
        "No. 225", "Oh5", "O_h^5",
        "F m 3\u0305 m", "F m \\bar{3} m", "F m \u22123 m",
    ):  # fmt: skip
        found[text] = block(symbol(text), A, NACL), SALT
    for text, where in (
        ("F d -3 m S", SILICON), ("Fd-3mZ", SILICON_2), ("F d -3 m :2", SILICON_2),
        ("F 41/d -3 2/m :1", SILICON), ("Fd3mO2", SILICON_2),
        ("F d -3 m (origin choice 1)", SILICON),
        ("F d -3 m {origin @ centre (-3m)}", SILICON_2), ("Fd3m:OR1", SILICON),
    ):  # fmt: skip
        found[text] = block(symbol(text), where), "Si8|227"
    for text in (
        "P 21/c",
        "P 1 21/c 1",
        "P21/c",
        "P2(1)/c",
        "P 2_1/c",
        "P 21/a",
        "P 21/n",
        "P121/c1",
    ):
        found[text] = block(symbol(text), MONOCLINIC, ZNS), "Zn4 S4|14"
    for text in ("P 21/b", "P 1 1 21/b", "P 21/c :c1"):
        found[f"{text}, unique b"] = block(symbol(text), MONOCLINIC, ZNS), "refuse"
    in_c = cell(6, 7, 8, 90, 90, 95)
    found["P 21/b, unique c"] = block(symbol("P 21/b"), in_c, ZNS), "Zn4 S4|14"
    found["P 21/c, unique c"] = block(symbol("P 21/c"), in_c, ZNS), "refuse"
    near = cell(6, 7, 8, 90, 90.3, 90)
    found["P 21/n, beta 90.3"] = block(symbol("P 21/n"), near, ZNS), "Zn4 S4|14"
    found["P 21/n, no unique axis"] = block(symbol("P 21/n"), cell(6, 7, 8), ZNS), "refuse"
    one = sites("Zn1 Zn .1 .2 .3")
    found["B 2/b"] = block(symbol("B 2/b"), in_c, one), "Zn8|15"
    found["I 2/a"] = block(symbol("I 2/a"), MONOCLINIC, one), "Zn8|15"
    found["number 14"] = block("_space_group_IT_number 14\n", MONOCLINIC, ZNS), "refuse"
    found["number 62"] = block("_space_group_IT_number 62\n", cell(6, 7, 8), one), "refuse"
    for text in ("R -3 m", "R-3m", "R -3 m :H", "R -3 m H", "R-3mh", "R -3 2/m"):
        found[f"{text}, hexagonal"] = block(symbol(text), HEXAGONAL, BITE), "Bi6 Te9|166"
    for text in ("R -3 m", "R -3 m :R", "R -3 m R", "R-3mr"):
        found[f"{text}, rhombohedral"] = block(symbol(text), RHOMBOHEDRAL, BITE_R), "Bi2 Te3|166"
    for text in ("F d -3 m (x+1/8,y+1/8,z+1/8)", "F d -3 m (a)", "P 31 2", "F d -3 m S Z"):
        found[text] = block(symbol(text), SILICON), "refuse"
    found["H on R"] = block(symbol("R -3 m :H"), RHOMBOHEDRAL, BITE_R), "refuse"
    found["R on H"] = block(symbol("R -3 m :R"), HEXAGONAL, BITE), "refuse"
    found["166:R"] = block("_space_group_IT_number 166:R\n", RHOMBOHEDRAL, BITE_R), "Bi2 Te3|166"
    return found


def symmetry() -> Cases:
    """Operations, Hall symbols, numbers, and what of them disagrees."""
    full = triplets_of("F m -3 m")
    hall = "_symmetry_space_group_name_Hall"
    diamond = symbol("F d -3 m")
    number, schoenflies = "_space_group_IT_number 225\n", "_space_group_name_Schoenflies 'Oh^5'\n"
    code = "_space_group_IT_coordinate_system_code 2\n"
    return {
        "number": (block(number, A, NACL), SALT),
        "number, symbol unknown": (block(symbol("?"), number, A, NACL), SALT),
        "Schoenflies": (block(schoenflies, A, NACL), SALT),
        "unquoted symbol": (block("_space_group_name_H-M_alt F m -3 m\n", A, NACL), SALT),
        "symbol in a text field": (
            block("_space_group_name_H-M_alt\n;F m -3 m\n;\n", A, NACL), SALT),
        "no such symbol": (block(symbol("Q x y"), A, NACL), "refuse"),
        "no such symbol, number": (block(symbol("Q x y"), number, A, NACL), "refuse"),
        "symbol and number differ": (
            block(FM3M, "_symmetry_Int_Tables_number 221\n", A, NACL), "refuse"),
        "two symbols": (block(FM3M, "_space_group_name_H-M_alt 'P 1'\n", A, NACL), "refuse"),
        "Hall and symbol differ": (
            block(symbol("P m -3 m"), f"{hall} '-F 4 2 3'\n", A, NACL), "refuse"),
        "Hall and origin differ": (
            block(symbol("F d -3 m :2"), f"{hall} 'F 4d 2 3 -1d'\n", SILICON), "refuse"),
        "Hall and operations differ": (
            block(f"{hall} '-P 4 2 3'\n", operations(*full), A, NACL), "refuse"),
        "cubic": (block("_symmetry_cell_setting cubic\n", A, NACL), "refuse"),
        "all atoms, no symmetry": (block(A, ALL), "refuse"),
        "origin open": (block(diamond, SILICON), "refuse"),
        "origin by Z": (block(diamond, formula("Si", 8), SILICON), "Si8|227"),
        "origin 2 by Z": (block(diamond, formula("Si", 8), SILICON_2), "Si8|227"),
        "origin by density": (
            block(diamond, "_exptl_crystal_density_diffrn 2.33\n", SILICON), "Si8|227"),
        "origin by code": (block(diamond, code, SILICON_2), "Si8|227"),
        "origin by multiplicity": (
            block(diamond, cell(5.431), sites("Si1 Si 0 0 0 8", more="symmetry_multiplicity")),
            "Si8|227"),
        "operations of another group": (
            block(FM3M, operations(*triplets_of("P m -3 m")), A, NACL), "refuse"),
        "operations beside P 1": (block(symbol("P 1"), operations(*full), A, NACL), "refuse"),
        "operations beside P 1, Z agrees": (
            block(symbol("P 1"), formula("Na Cl", 4), operations(*full), A, NACL), SALT),
        "operation missing": (block(operations(*full[:99], *full[100:]), A, NACL), "refuse"),
        "identity missing": (block(operations(*full[1:]), A, NACL), SALT),
        "operation twice": (block(operations(*full, full[5]), A, NACL), SALT),
        "operation misspelt": (block(operations(*full[:-1], "x,y,q"), A, NACL), "refuse"),
        "operations in capitals": (block(operations(*(o.upper() for o in full)), A, NACL), SALT),
        "operations in decimals": (
            block(operations(*(o.replace("1/2", "0.5") for o in full)), A, NACL), SALT),
        "operations with spaces": (
            block(operations(*(o.replace(",", " , ") for o in full)), A, NACL), SALT),
        "operations in one text": (
            block("_symmetry_equiv_pos_as_xyz\n;\n", "\n".join(full), "\n;\n", A, NACL), SALT),
        "operations unknown": (block(FM3M, "_symmetry_equiv_pos_as_xyz ?\n", A, NACL), SALT),
        "operations without centring": (block(FM3M, operations(*full[:48]), A, NACL), "refuse"),
        "all atoms with x,y,z beside a symbol": (block(FM3M, XYZ, A, ALL), SALT),
        "all atoms with x,y,z beside a number": (block(number, XYZ, A, ALL), SALT),
        "all atoms beside a symbol": (block(FM3M, A, ALL), SALT),
        "all atoms with all operations": (block(operations(*full), A, ALL), SALT),
        "all atoms in P 1": (block(symbol("P 1"), A, ALL), SALT),
        "asymmetric unit with x,y,z": (block(FM3M, XYZ, A, NACL), "refuse"),
        "the same with a number": (block(number, XYZ, A, NACL), "refuse"),
        "the same with a formula": (block(FM3M, formula("Na Cl"), XYZ, A, NACL), "refuse"),
        "the same with Z = 1": (block(FM3M, formula("Na Cl", 1), XYZ, A, NACL), "refuse"),
        "atoms at both ends of the cell": (
            block(XYZ, cell(4.12), sites("Cs Cs 0 0 0", "Cs Cs 1 0 1", "Cl Cl .5 .5 .5")),
            "Cs1 Cl1|221"),
    }  # fmt: skip
