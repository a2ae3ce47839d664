"""How many cases of each kind of structure file are read right, refused with a reason, or wrong.

    python tests/tried.py

Prints the table of docs/files.md: the files of tests/data/cases, the texts of tests/cif_cases.py
and tests/cif_contents.py, and random crystals in the 530 settings of International Tables. A case
is *right* if it gives the crystal that it means; *refused* counts those whose refusal is what is
wanted, or allowed.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from crysforge.datapipe.cif import read_cif
from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.sources import Failure, Raw, Reading, read_raw
from tests.cif_cases import in_short, is_as_wanted
from tests.cif_contents import every
from tests.cif_text import SETTINGS, example, largest_gap, text
from tests.datapipe.cif.test_cif_settings import ANGSTROM, FEW, ways

FILES = Path(__file__).parent / "data" / "cases"
KINDS = {
    "symbols": "spellings of symbols, origins, axes",
    "symmetry": "operations, Hall symbols, numbers, contradictions among them",
    "elements": "labels and type symbols",
    "values": "values and syntax",
    "facts": "formula, Z, density, volume, hydrogens, disorder, modulation",
}
"""The functions of `tests.cif_contents.every`, in words."""


def main() -> None:
    print("| kind | tried | right | refused with a reason | wrong |\n|---|---|---|---|---|")
    show("files after public reports (`tests/data/cases`)", files())
    for kind, words in KINDS.items():
        show(words, texts(kind))
    found = list(settings())
    few = "random crystals in the 530 settings: operations, Hall symbol, symbol"
    show(few, (verdict for way, verdict in found if way in FEW))
    more = "every sixth of them in seven ways more"
    show(more, (verdict for way, verdict in found if way not in FEW))


def show(kind: str, verdicts: Iterable[str]) -> None:
    found = Counter(verdicts)
    row = [found.total(), found["right"], found["refused"], found["wrong"]]
    print(f"| {kind} | {' | '.join(f'{n:,}' for n in row)} |", flush=True)


def files() -> Iterator[str]:
    with open(FILES / "expected.tsv", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    read = Reading()
    for name, wanted, _ in rows:
        yield " ".join({verdict(read(raw), wanted) for raw in read_raw(str(FILES / name))})


def texts(kind: str) -> Iterator[str]:
    read = Reading()
    for name, content, wanted in every():
        if name.startswith(f"{kind}:"):
            yield verdict(read(Raw("x", "here", ("text", content))), wanted)


def verdict(found: object, wanted: str) -> str:
    if isinstance(found, Failure):
        return "refused" if "refuse" in wanted else "wrong"
    return "right" if is_as_wanted(in_short(found), wanted) else "wrong"


def settings() -> Iterator[tuple[str, str]]:
    """(way, verdict) of a random crystal in every setting that has sites for it."""
    for place in range(len(SETTINGS)):
        rng = np.random.default_rng(place)
        one = example(SETTINGS[place], rng, int(rng.integers(2, 4)))
        for way, arguments in ways(one).items() if one.sites else ():
            if way in FEW or place % 6 == 0:
                least = ANGSTROM.get(arguments.get("digits", 7), 1e-3)
                try:
                    right = largest_gap(read_cif(text(one, **arguments)), one.crystal) < least
                except BadCrystal:
                    yield way, "refused"
                    continue
                yield way, "right" if right else "wrong"


if __name__ == "__main__":
    main()
