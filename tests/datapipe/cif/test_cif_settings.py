"""Every tabulated setting of every space group, named in every way: the right crystal or none."""

import numpy as np
import pytest

from crysforge.datapipe.cif import read_cif
from crysforge.datapipe.cif.groups.operations import group_of_hall
from crysforge.datapipe.crystals.crystal import BadCrystal
from tests.cif_text import SETTINGS, Example, all_sites, example, largest_gap, text

PARTS = 4
FEW = ("operations", "Hall", "symbol")
"""Ways that are tried with every setting; all others, with one setting in six."""
FACTS = ("formula", "z", "volume", "density")
XYZ = "loop_\n_symmetry_equiv_pos_as_xyz\n'x,y,z'"
ANGSTROM = {3: 0.08, 4: 0.01}
"""How far atoms may be off where coordinates have so few digits."""


def named(symbol: str) -> list[str]:
    return [f"_space_group_name_H-M_alt '{symbol}'"]


def ways(one: Example) -> dict[str, dict]:
    """Arguments of `text` for ways that leave nothing open."""
    entry = one.entry
    full = entry.hm + (f" :{entry.ext}" if entry.ext.strip("\x00") else "")
    return {
        "operations": {"operations": True},
        "4 digits": {"operations": True, "digits": 4},
        "3 digits": {"operations": True, "digits": 3},
        "all agree": {
            "operations": True,
            "symmetry": [*named(full), f"_space_group_IT_number {entry.number}"],
            "facts": FACTS,
        },
        "Hall": {"symmetry": [f"_space_group_name_Hall '{entry.hall}'"]},
        "symbol": {"symmetry": named(full)},
        "symbol without spaces": {"symmetry": named(full.replace(" ", ""))},
        "symbol in capitals": {"symmetry": named(full.upper()), "facts": FACTS},
        "all atoms": {"symmetry": [*named(full), XYZ], "sites": all_sites(one.crystal)},
        "all atoms and operations": {"operations": True, "sites": all_sites(one.crystal)},
    }


def open_ways(one: Example) -> dict[str, dict]:
    """Ways that may leave an origin or axes open, which then have to be refused."""
    number = [f"_space_group_IT_number {one.entry.number}"]
    short = one.entry.hm
    if 3 <= one.entry.number <= 15:
        short = " ".join(part for part in short.split() if part != "1")
    return {
        "symbol without origin": {"symmetry": named(one.entry.hm)},
        "symbol and Z": {"symmetry": named(one.entry.hm), "facts": ("formula", "z")},
        "symbol and density": {"symmetry": named(one.entry.hm), "facts": ("density",)},
        "short symbol": {"symmetry": named(short), "facts": ("formula",)},
        "number": {"symmetry": number},
        "number and facts": {"symmetry": number, "facts": FACTS},
        "asymmetric unit with x,y,z": {"symmetry": [*named(one.entry.hm), XYZ]},
    }


def examples(places: range) -> list[tuple[int, Example]]:
    found = []
    for place in places:
        rng = np.random.default_rng(place)
        found.append((place, example(SETTINGS[place], rng, int(rng.integers(2, 4)))))
    return [(place, one) for place, one in found if one.sites]


@pytest.mark.parametrize("part", range(PARTS))
def test_every_setting_is_read_right(part):
    for place, one in examples(range(part, len(SETTINGS), PARTS)):
        for way, arguments in ways(one).items():
            if way in FEW or place % 6 == 0:
                found = read_cif(text(one, **arguments))
                least = ANGSTROM.get(arguments.get("digits", 7), 1e-3)
                assert largest_gap(found, one.crystal) < least, (one.entry.xhm(), way)


def test_what_is_left_open_is_refused_or_right():
    right = 0
    for _, one in examples(range(2, len(SETTINGS), 11)):
        for way, arguments in open_ways(one).items():
            try:
                found = read_cif(text(one, **arguments))
            except BadCrystal as error:
                assert error.reason in ("ambiguous", "contradiction"), (one.entry.xhm(), way, error)
                continue
            right += 1
            assert largest_gap(found, one.crystal) < 1e-3, (one.entry.xhm(), way)
    assert right > 100


def test_operations_are_those_of_the_space_group():
    for entry in SETTINGS:
        group = group_of_hall(entry.hall)
        assert group.number == entry.number, entry.xhm()
        assert len(group) == len(list(entry.operations()))
        one = np.arange(len(group))
        assert (np.sort(group.product, axis=1) == one).all()  # a Latin square
