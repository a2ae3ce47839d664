"""Our reader against gemmi, ASE and pymatgen on the structure files that Python packages ship.

    python tests/public_files.py FOLDER [FOLDER …] [--show right|refused|other] [--markdown]

Each FOLDER is searched for CIF and POSCAR files: unpacked source distributions
(`pip download --no-deps --no-binary :all: NAME`), or site-packages. A crystal is *right* if a
second reader gives the same one: same atoms in the cell, and same distances between them. What we
refuse is counted by reason; what no second reader confirms is listed as *other*, with what each of
them says, for a person to judge.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from ase.data import chemical_symbols

from crysforge.datapipe.cif import read_cifs
from crysforge.datapipe.cif.geometry import nearest_distances
from crysforge.datapipe.common.text import decode
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.sources.poscar import read_poscar

_MOST_ATOMS = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--show", default="other", choices=["right", "refused", "other"])
    parser.add_argument("--markdown", action="store_true", help="end with a table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for folder in options.folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and kind(p)):
            for name, verdict, words in judge(path):
                counts[kind(path)][verdict] += 1
                if verdict.startswith(options.show):
                    print(f"{path} {name}: {verdict}: {words}", flush=True)
    for format_name, found in counts.items():
        print(f"\n{format_name}: {sum(found.values())} structures")
        for verdict, count in found.most_common():
            print(f"  {count:5d} {verdict}")
    if options.markdown:
        print("\n| | structures | right | refused with a reason | unconfirmed |")
        print("|---|---|---|---|---|")
        for format_name, found in counts.items():
            by = Counter[str]()
            for verdict, count in found.items():
                by[verdict.split(":")[0]] += count
            cells = [found.total(), by["right"], by["refused"], by["other"]]
            print(f"| {format_name} | {' | '.join(f'{n:,}' for n in cells)} |")


def kind(path: Path) -> str:
    """CIF, POSCAR or nothing."""
    name = path.name.lower().removesuffix(".gz")
    if name.startswith("."):
        return ""
    if name.endswith((".cif", ".mcif")):
        return "CIF"
    if name.endswith((".vasp", ".poscar")) or name.startswith(("poscar", "contcar")):
        return "" if name.endswith((".py", ".html", ".rst", ".md")) else "POSCAR"
    return ""


def judge(path: Path) -> list[tuple[str, str, str]]:
    """(block, verdict, words) of each structure of a file."""
    try:
        text = decode(path.read_bytes())
        if kind(path) == "CIF":
            ours = read_cifs(text)
        else:
            ours = [("", read_poscar(text))]
    except ValueError as error:
        return [("", f"refused: {getattr(error, 'reason', 'unreadable')}", str(error))]
    out = []
    for number, (name, crystal) in enumerate(ours):
        if isinstance(crystal, BadCrystal):
            out.append((name, f"refused: {crystal.reason}", str(crystal)))
            continue
        others = {}
        for reader, read in READERS[kind(path)].items():
            try:
                others[reader] = read(text, number)
            except Exception as error:  # foreign readers raise anything
                others[reader] = f"{type(error).__name__}: {error}"[:70]
        agree = [r for r, c in others.items() if isinstance(c, Crystal) and same(crystal, c)]
        verdict = "right" if agree else "other"
        words = f"ours {describe(crystal)}; " + "; ".join(
            f"{r} {describe(c) if isinstance(c, Crystal) else c}" for r, c in others.items()
        )
        out.append((name, verdict, words))
    return out


def describe(crystal: Crystal) -> str:
    """Formula and volume of the cell."""
    atoms = Counter(chemical_symbols[z] for z in crystal.numbers)
    return " ".join(f"{s}{n}" for s, n in sorted(atoms.items())) + f" V={crystal.volume:.1f}"


def same(a: Crystal, b: Crystal) -> bool:
    """Whether two crystals have the same atoms at the same distances."""
    if sorted(a.numbers) != sorted(b.numbers) or abs(a.volume / b.volume - 1) > 1e-3:
        return False
    if len(a) > _MOST_ATOMS:
        return True
    first, second = (
        np.concatenate(
            [
                np.sort(d[np.ix_(c.numbers == x, c.numbers == y)].ravel())
                for x in np.unique(c.numbers)
                for y in np.unique(c.numbers)
            ]
        )
        for c in (a, b)
        for d in [nearest_distances(c)]
    )
    return bool(np.allclose(first, second, atol=0.05))


def _gemmi(text: str, number: int) -> Crystal:
    import gemmi

    blocks = gemmi.cif.read_string(text, 0)
    blocks = [
        b
        for b in blocks
        if b.find_loop("_atom_site_fract_x").tag or b.find_loop("_atom_site.fract_x").tag
    ]
    structure = gemmi.make_small_structure_from_block(blocks[number])
    sites = structure.get_all_unit_cell_sites()
    numbers = [site.element.atomic_number for site in sites]
    cell = np.array(structure.cell.orth.mat.tolist()).T
    return Crystal.create("", numbers, [site.fract.tolist() for site in sites], cell)


def _ase(text: str, number: int) -> Crystal:
    from ase.io import read

    return Crystal.from_ase(read(io.StringIO(text), index=number, format="cif"))


def _pymatgen(text: str, number: int) -> Crystal:
    from pymatgen.io.cif import CifParser

    return Crystal.from_pymatgen(CifParser.from_str(text).parse_structures(primitive=False)[number])


def _ase_poscar(text: str, number: int) -> Crystal:
    from ase.io import read

    return Crystal.from_ase(read(io.StringIO(text), format="vasp"))


def _pymatgen_poscar(text: str, number: int) -> Crystal:
    from pymatgen.io.vasp import Poscar

    return Crystal.from_pymatgen(Poscar.from_str(text).structure)


READERS: dict[str, dict[str, Callable[[str, int], Crystal]]] = {
    "CIF": {"gemmi": _gemmi, "ase": _ase, "pymatgen": _pymatgen},
    "POSCAR": {"ase": _ase_poscar, "pymatgen": _pymatgen_poscar},
}

if __name__ == "__main__":
    main()
