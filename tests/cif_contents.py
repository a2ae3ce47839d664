"""CIF texts whose elements, values or facts are in question; see `tests.cif_cases`."""

from __future__ import annotations

from tests.cif_cases import (
    ALL,
    BITE_R,
    BRUCITE,
    CUBE,
    FM3M,
    MGOH,
    NACL,
    SALT,
    ZNS,
    A,
    Cases,
    block,
    cell,
    formula,
    sites,
    symbol,
    symbols,
    symmetry,
)

NO_TYPES = """
NH4 CO3 PO4 NO3 CN OH OH2 H2O ND4 BH4 CH3 SO4 CO NO Vac Va X M Wat Dum NH3 D2O AsO4 Q1 T A
"""
NO_LABELS = """
Mg/Fe Ca,Sr (Mg,Fe) AlSi1 FeMg2 Mg|Fe1 Fe0.5Mg0.5
Ow1 Vac1 VA1 H2O1 OH1 OS1 CO3 NH4 T1 X1 M1 Wat1 WAT CN1 Uk1 LP1 Cav1 Du1 1 Void OW Hw1 Vc1
"""


def elements() -> Cases:
    """Labels and type symbols."""
    mg, o, oh, h = "Mg1 0 0 0", "O1 {}", "OH {}", "H1 .33333 .66667 .43"
    o, oh = (text.format(".33333 .66667 .22") for text in (o, oh))
    sum_formula = formula("H2 Mg O2")

    def brucite(*rows: str, said: str = "") -> str:
        return block(said, BRUCITE, sites(*rows, types=False))

    def salt(first: str, second: str, said: str = "") -> str:
        rows = sites(f"{first} 0 0 0", f"{second} .5 .5 .5", types=False)
        return block(said, FM3M, A, rows)

    found: Cases = {
        "OH": (brucite(mg, oh, h, said=formula("Mg (O H)2")), MGOH),
        "OH, no formula": (brucite(mg, oh, h), "refuse"),
        "OH for both atoms": (brucite(mg, oh, said=formula("Mg (O H)2")), "refuse"),
        "HO1": (brucite(mg, o, h.replace("H1", "HO1"), said=sum_formula), MGOH),
        "HO1, no formula": (brucite(mg, o, h.replace("H1", "HO1")), "refuse"),
        "D": (brucite(mg, o, h.replace("H", "D"), said=formula("D2 Mg O2")), MGOH),
        "D, formula with H": (brucite(mg, o, h.replace("H", "D"), said=sum_formula), MGOH),
        "D, no formula": (brucite(mg, o, h.replace("H", "D")), MGOH),
        "capitals": (salt("NA1", "CL1", formula("Na Cl")), SALT),
        "small letters": (salt("na1", "cl1", formula("Na Cl")), SALT),
        "capitals, density": (salt("NA1", "CL1", "_exptl_crystal_density_diffrn 2.165\n"), SALT),
        "capitals, nothing else": (salt("NA1", "CL1"), "refuse"),
        "capitals, list of types": (
            salt("NA1", "CL1", "loop_\n_atom_type_symbol\nNa1+\nCl1-\n"), SALT),
        "no numbers": (salt("Na", "Cl"), SALT),
        "charges": (salt("Na+", "Cl-"), SALT),
        "parentheses": (salt("Na(1)", "Cl(1A)"), SALT),
        "alpha carbon": (
            block(formula("C Cl"), CUBE, sites("CA1 0 0 0", "Cl1 .5 .5 .5", types=False)),
            "C1 Cl1|221"),
        "tungsten": (
            block(formula("Cl W"), CUBE, sites("W1 0 0 0", "Cl1 .5 .5 .5", types=False)),
            "W1 Cl1|221"),
        "T site of silicon": (block(CUBE, sites("T1 Si 0 0 0", "Cl1 Cl .5 .5 .5")), "Si1 Cl1|221"),
    }  # fmt: skip
    for types in ("Mg2+ O2- H1+", "Mg+2 O-2 H+", "24Mg O 2H", "MG O D", "Mg O(h) H(O1)"):
        rows = [f"{r.split()[0]} {t} {' '.join(r.split()[1:])}"
                for r, t in zip((mg, o, h), types.split(), strict=True)]  # fmt: skip
        found[f"types {types}"] = block(BRUCITE, sites(*rows)), MGOH
    for name in NO_TYPES.split():
        found[f"type {name}"] = block(CUBE, sites(f"N1 {name} 0 0 0", "Cl1 Cl .5 .5 .5")), "refuse"
    for name in NO_LABELS.split():
        rows = sites(f"{name} 0 0 0", "Cl1 .5 .5 .5", types=False)
        found[f"label {name}"] = block(CUBE, rows), "refuse"
    for name, element in (
        ("Ca1", "Ca"), ("Co1", "Co"), ("Ho1", "Ho"), ("W1", "W"), ("Fe3+1", "Fe"), ("7Li1", "Li"),
        ("LI1", "Li"), ("MG", "Mg"), ("Os1", "Os"), ("SiA", "Si"), ("K1'", "K"), ("H*251", "H"),
        ("boron2a", None), ("C1A", "C"), ("O1W", "O"),
        ("FeOct", "Fe"), ("CuII", "Cu"), ("Fe1B", "Fe"), ("FeTd2", "Fe"),
    ):  # fmt: skip
        rows = sites(f"{name} 0 0 0", "Cl1 .5 .5 .5", types=False)
        found[f"label {name}"] = block(CUBE, rows), f"{element}1 Cl1|221" if element else "refuse"
    return found


def values() -> Cases:
    """Coordinates, occupancies, angles, syntax."""
    edges = "".join(A.splitlines(keepends=True)[:3])

    def salt(*rows: str, **more: str) -> str:
        return block(FM3M, A, sites(*rows, **more))

    na = "Na1 Na 0 0 0"
    occupied = {"more": "occupancy"}
    mg = sites("Mg1 Mg .33333 .66667 .25")
    mos2 = symbol("P 63/m m c") + cell(3.16, 3.16, 12.29, 90, 90, 120)
    cif_2 = "#\\#CIF_2.0\ndata_x\n_a.b [1 2 [3 4]]\n_c.d {'a':1}\n_e.f '''x\ny'''\n"
    many = [f"C{i} C .{i * 7919 % 9973:04} .{i * 104729 % 9967:04} .{i * 31337 % 9949:04}"
            for i in range(400)]  # fmt: skip
    return {
        "occupancy 1.000(3) and ?": (
            salt(na + " 1.000(3)", "Cl1 Cl .5 .5 .5 ?", **occupied), SALT),
        "occupancy 0.5": (salt(na + " 1", "Cl1 Cl .5 .5 .5 0.5", **occupied), "refuse"),
        "occupancy 2": (salt(na + " 1", "Cl1 Cl .5 .5 .5 2", **occupied), "refuse"),
        "two elements share": (
            salt(na + " 1", "Cl1 Cl .5 .5 .5 .5", "Br1 Br .5 .5 .5 .5", **occupied), "refuse"),
        "two ions of an element share": (
            salt(na + " 1", "Cl1 Cl1- .5 .5 .5 .5", "Cl2 Cl .5 .5 .5 .5", **occupied), SALT),
        "two elements in one place": (salt(na, "Cl1 Cl .5 .5 .5", "Br1 Br .5 .5 .5"), "refuse"),
        "one disorder group": (
            salt(na + " .", "Cl1 Cl .5 .5 .5 1", more="disorder_group"), SALT),
        "disorder about an element of symmetry": (
            salt(na + " .", "Cl1 Cl .5 .5 .5 -1", more="disorder_group"), "refuse"),
        "coordinate unknown": (salt(na, "Cl1 Cl .5 ? .5"), "refuse"),
        "coordinate with uncertainty": (salt(na, "Cl1 Cl 0.5(1) .5 0.50(2)"), SALT),
        "coordinate as fraction": (salt(na, "Cl1 Cl 1/2 1/2 1/2"), SALT),
        "decimal comma": (salt(na, "Cl1 Cl 0,5 0,5 0,5"), "refuse"),
        "no angles, cubic": (block(FM3M, edges, NACL), SALT),
        "angles unknown, hexagonal": (
            block(symbol("P 63/m m c"), "_cell_length_a 3.2\n_cell_length_b 3.2\n",
                  "_cell_length_c 5.2\n_cell_angle_gamma ?\n", mg), "Mg2|194"),
        "no angles, P 1": (block(symbol("P 1"), edges, ALL), "refuse"),
        "no angles, monoclinic": (block(symbol("P 1 21/c 1"), edges, ZNS), "refuse"),
        "beta alone": (
            block(symbol("P 1 21/c 1"), edges, "_cell_angle_beta 95\n", ZNS), "Zn4 S4|14"),
        "no angles, R": (
            block(symbol("R -3 m"), edges.replace("5.6402", "10.473"), BITE_R), "refuse"),
        "2 digits": (block(mos2, sites("Mo Mo .33 .67 .25", "S S .33 .67 .62")), "Mo2 S4|194"),
        "cut, not rounded": (
            block(mos2, sites("Mo Mo .333 .666 .25", "S S .333 .666 .621")), "Mo2 S4|194"),
        "no header": (FM3M + A + NACL, SALT),
        "lists of CIF 2": (cif_2 + FM3M + A + NACL, SALT),
        "a tag twice": (block(FM3M, A, "_cell_length_a 6.0\n", NACL), "refuse"),
        "a tag twice, once empty": (block(FM3M, A, "_cell_length_a ''\n", NACL), SALT),
        "thousands of atoms": (block(FM3M, cell(90), sites(*many)), "refuse"),
        "no CIF": ("<html>_cell_length_a 404</html>", "refuse"),
        "nothing": ("", "refuse"),
        "two structures": (block(FM3M, A, NACL) + "data_y\n" + FM3M + A + NACL, "refuse"),
    }  # fmt: skip


def facts() -> Cases:
    """What the file says beside its atoms."""

    def salt(said: str, atoms: str = NACL) -> str:
        return block(said, FM3M, A, atoms)

    density, measured = "_exptl_crystal_density_diffrn", "_exptl_crystal_density_meas"
    weight = "_cell_formula_units_Z 4\n_chemical_formula_weight"
    moiety = "_chemical_formula_moiety"
    dummy = sites("Na1 Na 0 0 0 d", "Cl1 Cl .5 .5 .5 d", "X1 Na .2 .2 .2 dum", more="calc_flag")

    def hydrogens(count: str) -> str:
        return sites("Na1 Na 0 0 0 0", f"Cl1 Cl .5 .5 .5 {count}", more="attached_hydrogens")

    return {
        "Z": (salt(formula("Na Cl", 2)), "refuse"),
        "Z of the cell's own formula": (salt(formula("Na4 Cl4", 4)), SALT),
        "an element too many": (salt(formula("Na Cl O")), "refuse"),
        "an element missing": (salt(formula("Na")), "refuse"),
        "density": (salt(f"{density} 4.3\n"), "refuse"),
        "density, of a cell in pm": (
            block(cell(564.02), FM3M, NACL, f"{density} 2.165\n"), "refuse"),
        "density, rounded": (salt(f"{density} 2.2\n"), SALT),
        "density in kg/m3": (salt(f"{density} 2165\n"), SALT),
        "density in words": (salt(f"{density} ?\n{measured} 'not measured'\n"), SALT),
        "density as measured": (salt(f"{measured} 4\n"), "refuse"),
        "volume of another cell": (salt("_cell_volume 44.86\n"), "refuse"),
        "volume": (salt("_cell_volume 179.4(2)\n"), SALT),
        "weight": (salt(f"{weight} 58.44\n"), SALT),
        "weight with water": (salt(f"{weight} 76.45\n"), "refuse"),
        "moiety": (salt(f"{moiety} 'Na 1+, Cl 1-'\n"), SALT),
        "moiety with water": (salt(f"{moiety} 'Na Cl, 2(H2 O)'\n"), "refuse"),
        "multiplicity": (
            salt("", sites("Na Na 0 0 0 8", "Cl Cl .5 .5 .5 4", more="symmetry_multiplicity")),
            "refuse"),
        "attached hydrogens": (salt("", hydrogens("2")), "refuse"),
        "no attached hydrogens": (salt("", hydrogens(".")), SALT),
        "attached hydrogens, none in the formula": (
            salt(formula("Na Cl"), hydrogens("1")), "refuse"),
        "attached hydrogens that are listed": (
            block(formula("Mg (O H)2"), BRUCITE,
                  sites("Mg Mg 0 0 0 0", "O O .33333 .66667 .22 1", "H H .33333 .66667 .43 0",
                        more="attached_hydrogens")), MGOH),
        "electrons": (salt("_exptl_crystal_F_000 112\n"), SALT),
        "electrons of hydrogen atoms that are missing": (
            salt("_exptl_crystal_F_000 120\n"), "refuse"),
        "F000 of neutrons": (
            salt("_exptl_crystal_F_000 52\n_diffrn_radiation_probe neutron\n"), SALT),
        "split site, no word of it": (
            salt("", sites("Na Na 0 0 0", "Cl1 Cl .5 .5 .5", "Cl2 Cl .5 .5 .38")), "refuse"),
        "dummy": (salt("", dummy), "refuse"),
        "dummy, formula without it": (salt(formula("Na Cl"), dummy), SALT),
        "dimension 0": (salt("_cell_modulation_dimension 0\n"), SALT),
        "modulated": (salt("_exptl_crystal_type_of_structure mod\n"), "refuse"),
        "a crystal": (salt("_exptl_crystal_type_of_structure cryst\n"), SALT),
        "wave vector": (salt("loop_\n_cell_wave_vector_seq_id\n_cell_wave_vector_x\n1 0.3\n"),
                        "refuse"),
        "displacement wave": (salt("loop_\n_atom_site_displace_Fourier_id\n1\n"), "refuse"),
    }  # fmt: skip


def every() -> list[tuple[str, str, str]]:
    """(name, text, wanted) of all cases."""
    return [
        (f"{make.__name__}: {name}", text, wanted)
        for make in (symbols, symmetry, elements, values, facts)
        for name, (text, wanted) in make().items()
    ]
