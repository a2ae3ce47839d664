"""Crystals to write, and no waiting for the disk."""

import os

import pytest

from tests.damage import make_crystals


@pytest.fixture(scope="module", autouse=True)
def no_syncing():
    """No test here cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def crystals(random_crystal):
    return make_crystals(random_crystal)
