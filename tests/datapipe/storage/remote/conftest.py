"""A small data set, a server of it, and how it is read from there."""

import pytest

from crysforge.datapipe.storage import remote as source
from crysforge.datapipe.storage.remote import Access
from tests.serving import make_set, serve


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(source, "FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def root(tmp_path_factory, random_crystal):
    return make_set(tmp_path_factory.mktemp("remote") / "data", random_crystal)


@pytest.fixture
def access(tmp_path):
    return Access(tries=3, timeout_s=30.0, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def server(root):
    with serve(root) as server:
        yield server
