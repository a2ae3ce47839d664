"""What all tests share: small random crystals, and settings of the property tests."""

import os

from crysforge.datapipe.common import threads

threads.choose()  # tests call what launch scripts do in this process

import numpy as np
import pytest
import torch
from hypothesis import settings

from crysforge.datapipe.crystals.crystal import Crystal
from tests.runs import call, data, exploit, runs  # noqa: F401 - fixtures

if not torch.cuda.is_available():  # read when Triton is imported, which needs a GPU otherwise
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A slow machine is no failure, and a failure should come again on the next run.
settings.register_profile("crysforge", deadline=None, derandomize=True)
settings.load_profile("crysforge")


def make_crystal(rng, n, id="crystal", targets=None):
    """A random crystal with n atoms in a skewed cell of about 15 Å³ per atom."""
    cell = np.eye(3) + rng.uniform(-0.3, 0.3, (3, 3))
    cell *= (15 * n / abs(np.linalg.det(cell))) ** (1 / 3)
    return Crystal.create(id, rng.integers(1, 95, n), rng.random((n, 3)), cell, targets)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def random_crystal():
    """The function `random_crystal(rng, n, id="crystal", targets=None) -> Crystal`."""
    return make_crystal
