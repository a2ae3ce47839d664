"""Crystals as CIF texts, and a table of them."""

import pytest

from tests.tables import make_cifs, rows, write


@pytest.fixture(scope="module")
def cifs() -> list[str]:
    return make_cifs()


@pytest.fixture
def source(tmp_path, cifs) -> str:
    return write(tmp_path / "all.csv", rows(cifs))
