"""Files as crystallographers have them: the right crystal, or an error that says why; no other."""

import csv
from pathlib import Path

import pytest

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.filters import Filters, closest_pair
from crysforge.datapipe.sources import Failure, Reading, read_raw
from crysforge.datapipe.sources.base import Raw
from tests.cif_cases import in_short, is_as_wanted
from tests.cif_contents import every

FILES = Path(__file__).resolve().parents[2] / "data" / "cases"
READ = Reading((), Filters())


def short(found: Crystal | Failure) -> str:
    """As it is written in the tables: a formula, or `refuse`."""
    if isinstance(found, Failure):
        assert found.message and "\n" not in found.message
        assert "Error:" not in found.message  # a foreign parser's words
        return "refuse"
    return in_short(found)


def rows() -> list[list[str]]:
    with open(FILES / "expected.tsv", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))[1:]


@pytest.mark.parametrize(("name", "wanted", "shortest"), rows(), ids=[r[0] for r in rows()])
def test_a_file_gives_the_crystal_that_it_means(name, wanted, shortest):
    found = [READ(raw) for raw in read_raw(str(FILES / name))]
    assert len(found) == 1
    assert is_as_wanted(short(found[0]), wanted), found[0]
    if wanted != "refuse":
        assert closest_pair(found[0], 4.0)[2] == pytest.approx(float(shortest), abs=0.02)


CASES = every()


@pytest.mark.parametrize(("name", "text", "wanted"), CASES, ids=[c[0] for c in CASES])
def test_a_text_gives_the_crystal_that_it_means(name, text, wanted):
    found = READ(Raw("x", "here", ("text", text)))
    assert is_as_wanted(short(found), wanted), found
