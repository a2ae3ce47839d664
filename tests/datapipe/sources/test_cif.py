"""CIF text: what the fast reader takes it reads as pymatgen does, and the rest it leaves alone."""

import numpy as np
import pytest
from pymatgen.core import Element, Lattice, Structure
from pymatgen.io.cif import CifParser, CifWriter

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.sources import cif as cif_module
from crysforge.datapipe.sources.cif import read_cif
from tests.layouts import assert_same, cif, make_structure

# The fast CIF reader


def snapped(rng: np.random.Generator) -> Structure:
    structure = make_structure(rng)
    frac = structure.frac_coords.copy()
    near = rng.choice([1 / 3, 2 / 3, 0.33333, 0.66667, 0.3334, -1 / 3], frac.shape)
    return Structure(
        structure.lattice, structure.species, np.where(rng.random(frac.shape) < 0.3, near, frac)
    )


@pytest.mark.filterwarnings("ignore:Issues encountered")
@pytest.mark.parametrize("seed", range(40))
def test_fast_cif_reader_is_pymatgens(seed, monkeypatch):
    text = cif(snapped(np.random.default_rng(seed)))
    structure = CifParser.from_str(text).parse_structures(primitive=False)[0]
    wanted = Crystal.from_pymatgen(structure)
    fast = cif_module._read_p1(text)
    assert fast is not None
    assert fast.numbers.tolist() == wanted.numbers.tolist()
    np.testing.assert_allclose(fast.lattice, wanted.lattice, atol=1e-12)
    gap = np.abs(fast.frac_coords - wanted.frac_coords)
    assert np.minimum(gap, 1 - gap).max() < 1e-12
    monkeypatch.setattr(cif_module, "_read_p1", lambda text: None)
    assert read_cif(text).numbers.tolist() == wanted.numbers.tolist()


def test_electronegativity_order_is_pymatgens():
    order = cif_module._BY_ELECTRONEGATIVITY.split()
    known = [e for e in Element if e.symbol in order]
    assert order == [e.symbol for e in sorted(known, key=lambda e: (e.X, e.symbol))]
    assert len(order) == len(known) == len(set(order))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  1  'x, y, z'", "  1  'x, y, z'\n  2  '-x, -y, -z'"),
        ("  1\n", "  0.5\n"),
        ("_symmetry_Int_Tables_number   1", "_symmetry_Int_Tables_number   2"),
        ("_cell_length_a   ", "_cell_length_a   4("),
        ("  Na  ", "  Na1+  "),
        (" _atom_site_occupancy\n", " _atom_site_occupancy\n _atom_site_adp_type\n"),
    ],
)
def test_fast_cif_reader_leaves_other_dialects_alone(old, new):
    text = cif(Structure(Lattice.cubic(5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
    assert old in text
    assert cif_module._read_p1(text) is not None
    assert cif_module._read_p1(text.replace(old, new)) is None


def test_symmetric_cif_is_expanded():
    rocksalt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    assert_same(read_cif(str(CifWriter(rocksalt, symprec=0.01))), rocksalt)


def test_deuterium_is_hydrogen():
    text = cif(Structure(Lattice.cubic(5), ["H", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
    assert sorted(read_cif(text.replace("  H  H0", "  D  D0")).numbers.tolist()) == [1, 17]
